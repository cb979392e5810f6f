"""Checkpoints for tests: tiny random Llamas, a real one with padded heads, and what Hugging Face makes of them."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

# 9 query and 3 key-value heads -> 12 and 4, each new group as (key-value head, its query heads; None is padding).
# Every rank of TP 1, 2 and 4 keeps at least one real head, so that no rank's partial sum is exactly zero.
PADDED_GROUPS = [(0, [0, 1, None]), (0, [2, None, None]), (1, [3, 4, 5]), (2, [6, 7, 8])]


def tiny_llama(folder, *, seed=0, max_shard_size="5GB", **config):
    """Writes a random LlamaForCausalLM with `config` over small defaults, and returns `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    defaults = {
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
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(defaults | config)))
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
