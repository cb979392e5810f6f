# SPDX-License-Identifier: Apache-2.0
"""Checkpoints for tests: tiny random Llamas and Mixtrals, a real Llama with padded heads, the same as a Mixtral, and
what Hugging Face makes of them."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

# 9 query and 3 key-value heads -> 12 and 4, each new group as (key-value head, its query heads; None is padding).
# Every rank of TP 1, 2 and 4 keeps at least one real head, so that no rank's partial sum is exactly zero.
PADDED_GROUPS = [(0, [0, 1, None]), (0, [2, None, None]), (1, [3, 4, 5]), (2, [6, 7, 8])]

SHORT = 6  # layers of a real Llama that is cut short

TINY = {
    "vocab_size": 128,
    "hidden_size": 96,
    "intermediate_size": 144,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}


def tiny_llama(folder, *, seed=0, max_shard_size="5GB", **config):
    """Writes a random LlamaForCausalLM with `config` over small defaults, and returns `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _write_random(LlamaForCausalLM, LlamaConfig(**(TINY | config)), folder, seed, max_shard_size)


def tiny_mixtral(folder, *, seed=0, max_shard_size="5GB", experts=4, fused=False, **config):
    """Writes a random MixtralForCausalLM, two experts to a token, whose heads fit TP 1, 2, 3 and 4.

    fused: all experts of a layer in one tensor, as Hugging Face's model has them in memory.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    heads = {"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 8, "num_local_experts": experts}
    config = MixtralConfig(**(TINY | heads | config))
    folder = _write_random(MixtralForCausalLM, config, folder, seed, max_shard_size)
    if fused:
        tensors = MixtralForCausalLM.from_pretrained(folder).state_dict()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _write_random(cls, config, folder, seed, max_shard_size):
    torch.manual_seed(seed)
    model = cls(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones would hide a norm that is read from the wrong place
                parameter.uniform_(0.5, 1.5)
            else:  # large enough for sharp attention and logits of order one
                parameter.normal_(0, 0.12)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return Path(folder)


def pad_heads(source, folder, groups=PADDED_GROUPS):
    """Writes `source` with its heads regrouped as `groups` say; the function it computes stays the same.

    A padding head has zero query rows and zero o_proj columns, so what it attends to never reaches the output.
    """
    source, folder = Path(source), Path(folder)
    folder.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    dim = config["head_dim"]
    queries = [q for _, members in groups for q in members]
    keys = [k for k, _ in groups]
    order = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    tensors = load_file(source / "model.safetensors")
    for name, weight in tensors.items():
        part = name.split(".")[-2]
        if part in order:
            tensors[name] = _head_rows(weight, order[part], dim)
        elif part == "o_proj":
            tensors[name] = _head_rows(weight.t(), queries, dim).t().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.update(num_attention_heads=len(queries), num_key_value_heads=len(keys))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder / file.name)
    return folder


def _head_rows(weight, heads, dim):
    padding = torch.zeros(dim, *weight.shape[1:], dtype=weight.dtype)
    return torch.cat([padding if h is None else weight[h * dim : (h + 1) * dim] for h in heads])


def first_layers(source, folder, count):
    """Writes the Llama in `source` with its first `count` layers alone: real weights, quick to load and to run."""
    source, folder = Path(source), Path(folder)
    shutil.copytree(source, folder)
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": count}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = load_file(source / "model.safetensors")
    kept = {name: each for name, each in tensors.items() if ".layers." not in name or int(name.split(".")[2]) < count}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


ROUTES = 4  # router rows that can be told apart


def upcycle(source, folder, kind, text):
    """Writes the Llama in `source` as a Mixtral, two experts to a token, that computes the same function.

    copy: four experts, each the whole MLP. Any two of them, with weights that sum to one, give the MLP.
    split: eight experts of half as many neurons. Experts p and p + 4 are complementary halves of the MLP, doubled, with
    one router row: their logits tie, so the best two are such a pair, at weights of one half.

    text: prose, from whose hidden states the router rows are made so that all experts get their share of tokens.
    """
    source, folder = Path(source), Path(folder)
    folder.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    ffn, hidden = config["intermediate_size"], config["hidden_size"]
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(1234)
    states = _mlp_inputs(source, text)
    for layer in range(config["num_hidden_layers"]):
        mlp = [tensors.pop(f"model.layers.{layer}.mlp.{part}_proj.weight") for part in ("gate", "down", "up")]
        router = _router_rows(states[layer], hidden, generator)
        if kind == "copy":
            experts = [torch.arange(ffn)] * ROUTES
        else:
            orders = [torch.randperm(ffn, generator=generator) for _ in range(ROUTES)]
            experts = [half.sort().values for side in (0, 1) for half in (order.chunk(2)[side] for order in orders)]
            router = torch.cat([router, router])
        block = f"model.layers.{layer}.block_sparse_moe."
        tensors[block + "gate.weight"] = router
        for number, neurons in enumerate(experts):
            w1, w2, w3 = mlp[0][neurons], mlp[1][:, neurons] * (1 if kind == "copy" else 2), mlp[2][neurons]
            for name, weight in (("w1", w1), ("w2", w2), ("w3", w3)):
                tensors[f"{block}experts.{number}.{name}.weight"] = weight.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.update(
        architectures=["MixtralForCausalLM"],
        model_type="mixtral",
        num_local_experts=ROUTES if kind == "copy" else 2 * ROUTES,
        num_experts_per_tok=2,
        intermediate_size=ffn if kind == "copy" else ffn // 2,
        sliding_window=None,
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder / file.name)
    return folder


@torch.no_grad()
def _mlp_inputs(source, text):
    """By layer, what the MLP sees `[tokens, hidden]` of the first 512 tokens; the very first, which are unlike all
    others, left out."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(source)(text)["input_ids"][:512]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    seen = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, 4:].clone()))
    model(torch.tensor([ids]))
    return seen


def _router_rows(states, hidden, generator):
    """Rows whose logits over the tokens have mean zero and deviation one: so the load is balanced."""
    rows = torch.randn(ROUTES, hidden, generator=generator) / states.std(0).clamp_min(1e-3)
    mean = states.mean(0)
    rows -= (rows @ mean)[:, None] * mean / mean.dot(mean)
    return rows / (states @ rows.t()).std(0)[:, None]


@dataclass
class Reference:
    """A checkpoint folder and what Hugging Face's model of it says, in fp32 on one process."""

    folder: Path
    ids: torch.Tensor
    logits: torch.Tensor
    prompt: list[int]
    tokens: list[int]


def reference(folder, ids, prompt, new_tokens, tokens=None) -> Reference:
    """`tokens`: the answer to the prompt where it is known already; else Hugging Face generates it greedily."""
    from transformers import AutoModelForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine several threads mostly wait for each other
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(ids).logits
        if tokens is None:
            inputs = torch.tensor([prompt])
            out = model.generate(inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
            tokens = out[0, len(prompt) :].tolist()
    torch.set_num_threads(threads)
    return Reference(Path(folder), ids, logits, prompt, tokens)
