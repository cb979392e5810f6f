# SPDX-License-Identifier: Apache-2.0
"""Mixtral checkpoints: which experts a rank takes, both layouts on disk, and what real weights say.

No trained mixture is small enough for a test: the real ones here are a dense model, upcycled so that they compute the
same (`checkpoints.upcycle`).
"""

import json
import shutil
from collections import Counter

import pytest
import torch
from checkpoints import SHORT, reference, tiny_mixtral
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from transformers import MixtralForCausalLM

from megatron_comp.inference import hf, shards
from megatron_comp.inference.generate import generate, logits
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.inference.shards import check_tensor_parallel

SHARES = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2), (3, 4), (1, 8)]  # TP x EP


def shares(tp, ep):
    return [shards.Share(rank, tp, expert_rank, ep) for expert_rank in range(ep) for rank in range(tp)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model of eight experts on disk in four ways."""
    base = tmp_path_factory.mktemp("mixtral")
    return {
        "experts": tiny_mixtral(base / "experts", experts=8),
        "fused": tiny_mixtral(base / "fused", experts=8, fused=True),
        "shards": tiny_mixtral(base / "shards", experts=8, max_shard_size="200KB"),
        "tied": tiny_mixtral(base / "tied", experts=8, tie_word_embeddings=True),
    }


@pytest.mark.parametrize("fused", [False, True], ids=["experts", "fused"])
@pytest.mark.parametrize("tp, ep", SHARES, ids=lambda n: str(n))
def test_ranks_together_plan_every_expert_once(folders, tp, ep, fused):
    """Each value of each expert's tensors is in the plan of one rank; routers are in every plan whole."""
    config = hf.read_config(folders["experts"])
    seen, shapes = {}, {}
    for share in shares(tp, ep):
        for name, pieces in shards.plan(config, share, fused).items():
            for piece in pieces:
                if ".mlp." not in name:
                    continue
                shapes[piece.tensor] = piece.shape
                counts = seen.setdefault(piece.tensor, torch.zeros(piece.shape, dtype=torch.int64))
                place = counts if piece.index is None else counts[piece.index]
                place[slice(*piece.rows), slice(*piece.columns)] += 1
    whole = MixtralForCausalLM.from_pretrained(folders["fused"]).state_dict() if fused else None
    on_disk = whole or load_file(folders["experts"] / "model.safetensors")
    assert {n: tuple(t.shape) for n, t in on_disk.items() if "experts" in n or ".gate." in n} == shapes
    for name, counts in seen.items():
        assert (counts == (tp * ep if name.endswith("gate.weight") else 1)).all(), name


@pytest.mark.parametrize("tp, ep", [(1, 1), (2, 1), (2, 4), (3, 2)], ids=lambda n: str(n))
def test_both_layouts_fill_the_same_parameters(folders, tp, ep):
    """And these are Hugging Face's experts, gate rows over up rows on every rank."""
    config = hf.read_config(folders["experts"])
    tensors = load_file(folders["experts"] / "model.safetensors")
    for share in shares(tp, ep):
        filled = {name: parameters(folders[name], share) for name in ("experts", "fused", "shards")}
        for name, parameter in filled["experts"].items():
            assert torch.equal(parameter, filled["fused"][name]) and torch.equal(parameter, filled["shards"][name])
        first, last = 144 * share.rank // tp, 144 * (share.rank + 1) // tp
        for place, expert in enumerate(range(8 * share.expert_rank // ep, 8 * (share.expert_rank + 1) // ep)):
            theirs = f"model.layers.1.block_sparse_moe.experts.{expert}."
            ours = f"decoder.layers.1.mlp.experts.local_experts.{place}."
            w1, w2, w3 = (tensors[f"{theirs}w{n}.weight"] for n in (1, 2, 3))
            both = torch.cat([w1[first:last], w3[first:last]])
            assert torch.equal(filled["experts"][ours + "linear_fc1.weight"], both)
            assert torch.equal(filled["experts"][ours + "linear_fc2.weight"], w2[:, first:last])
        router = filled["experts"]["decoder.layers.1.mlp.router.weight"]
        assert torch.equal(router, tensors["model.layers.1.block_sparse_moe.gate.weight"])
        assert config.num_local_experts == 8


def parameters(folder, share):
    """What a rank reads of a folder, as `load_weights` does, without a model."""
    config, made = hf.read_config(folder), {}
    with hf.Checkpoint(folder) as checkpoint:
        fused = any("gate_up_proj" in name for name in checkpoint.names)
        for name, pieces in shards.plan(config, share, fused).items():
            made[name] = torch.cat([checkpoint.read(piece) for piece in pieces])
    return made


def built(rank, world_size, folders, ids):
    """Logits of each folder."""
    init_parallel(1, expert_parallel=world_size)
    return {name: logits(build_model(folder), ids, gather=True) for name, folder in folders.items()}


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_every_layout_builds_hugging_faces_model(folders, ep):
    ids = torch.arange(2, 28).view(2, 13)
    with torch.no_grad():
        expected = {name: MixtralForCausalLM.from_pretrained(folder)(ids).logits for name, folder in folders.items()}
    for made in run_ranks(built, ep, folders, ids):
        for name in folders:
            torch.testing.assert_close(made[name], expected[name], atol=1e-4, rtol=0)


# What is wrong with a folder.

EXPERT = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
FUSED = "model.layers.1.mlp.experts.down_proj"


def replace(name, value):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = value
        if value is None:
            del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return damage


def drop_shard(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (folder / index["weight_map"][EXPERT]).unlink()


@pytest.mark.parametrize(
    "name, damage, error, message",
    [
        ("experts", replace(EXPERT, None), ValueError, rf"{EXPERT} is missing; expected one of shape \[96, 144\]"),
        ("experts", replace(EXPERT, torch.ones(96, 143)), ValueError, rf"{EXPERT} has shape \[96, 143\], expected"),
        (
            "experts",
            replace(EXPERT.replace("experts.5", "experts.8"), torch.ones(96, 144)),
            ValueError,
            r"1 tensors have no place in this model, the first is .*experts\.8\.w2\.weight",
        ),
        (
            "experts",
            replace("model.layers.1.block_sparse_moe.gate.weight", torch.ones(4, 96)),
            ValueError,
            r"gate\.weight has shape \[4, 96\], expected \[8, 96\]",
        ),
        ("fused", replace(FUSED, None), ValueError, rf"{FUSED} is missing; expected one of shape \[8, 96, 144\]"),
        (
            "fused",
            replace(FUSED, torch.ones(8, 144, 96)),
            ValueError,
            rf"{FUSED} has shape \[8, 144, 96\], expected \[8, 96, 144\]",
        ),
        (
            "fused",
            replace(FUSED.replace("down", "gate_up"), torch.ones(4, 288, 96)),
            ValueError,
            r"gate_up_proj has shape \[4, 288, 96\], expected \[8, 288, 96\]",
        ),
        (
            "fused",
            replace(EXPERT, torch.ones(96, 144)),
            ValueError,
            r"1 tensors have no place in this model, the first is .*experts\.5\.w2\.weight",
        ),
        ("shards", drop_shard, FileNotFoundError, r"model-\d+-of-\d+\.safetensors is missing"),
    ],
)
def test_damaged_checkpoints(folders, tmp_path, name, damage, error, message):
    folder = shutil.copytree(folders[name], tmp_path / "checkpoint")
    damage(folder)
    with pytest.raises(error, match=message):
        run_one(folder)


def run_one(folder):
    """`build_model` on one rank, which raises here what it raised there."""
    (said,) = run_ranks(what_it_says, 1, folder)
    if said is not None:
        raise said


def what_it_says(rank, world_size, folder):
    init_parallel(1)
    try:
        build_model(folder)
    except (ValueError, FileNotFoundError) as error:
        return error
    return None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sliding_window": 128}, "sliding_window is 128; only null is supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; allowed: 'silu'"),
        ({"architectures": ["LlamaForCausalLM"]}, r"LlamaForCausalLM \(model_type mixtral\) is not supported"),
        ({"num_key_value_heads": 5}, "12 is not a multiple of num_key_value_heads 5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_that_are_refused(folders, tmp_path, change, message):
    config = json.loads((folders["experts"] / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        hf.read_config(tmp_path)


def test_experts_must_divide(folders):
    config = hf.read_config(folders["experts"])
    config.intermediate_size = 146
    with pytest.raises(ValueError, match="3 does not divide intermediate_size 146"):
        check_tensor_parallel(config, 3)


# Real weights.

NEW_TOKENS = 6
PROMPT = "The three branches of the government of the United States are"


@pytest.fixture(scope="module")
def dense(smollm2_short_padded, sotu_text):
    """Hugging Face's logits of the dense model for 96 tokens of prose, and its answer to a prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_short_padded)
    with open(sotu_text) as text:
        ids = torch.tensor([tokenizer(text.read(2000))["input_ids"][:96]])
    return reference(smollm2_short_padded, ids, tokenizer(PROMPT)["input_ids"], NEW_TOKENS)


@torch.no_grad()
def mixtures(rank, world_size, ref, folders):
    """(kind, dispatcher) -> difference of logits, kind -> text; and how many tokens came to each expert."""
    init_parallel(world_size)
    made, loads = {}, Counter()
    for kind, folder in folders.items():
        for dispatcher in ("allgather", "alltoall"):
            model = build_model(folder, token_dispatcher=dispatcher)
            if dispatcher == "allgather":
                made[kind] = generate(model, ref.prompt, NEW_TOKENS).tokens
                for layer in model.decoder.layers:
                    layer.mlp.router.register_forward_hook(
                        lambda _, __, out, kind=kind: loads.update(
                            {(kind, e): n for e, n in enumerate(out[1].sum(0).tolist())}
                        )
                    )
            made[kind, dispatcher] = (logits(model, ref.ids, gather=True) - ref.logits).abs().max().item()
    if world_size == 1:  # of the split model: other partners for the experts of one layer
        router = model.decoder.layers[3].mlp.router
        router.weight[4:] = router.weight[4:].roll(1, 0)
        made["misrouted"] = (logits(model, ref.ids, gather=True) - ref.logits).abs().max().item()
    return made, loads


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_an_upcycled_model_is_the_dense_one(dense, mixtral_copy, mixtral_split, record_property, tp):
    folders = {"copy": mixtral_copy, "split": mixtral_split}
    for made, loads in run_ranks(mixtures, tp, dense, folders, timeout=300):
        for kind, experts in (("copy", 4), ("split", 8)):
            assert made[kind] == dense.tokens
            for dispatcher in ("allgather", "alltoall"):
                record_property(f"{kind} {dispatcher}", made[kind, dispatcher])
                assert made[kind, dispatcher] < 1e-4, (kind, dispatcher)
            every = [loads[kind, expert] for expert in range(experts)]
            assert sum(every) == 2 * SHORT * dense.ids.numel()  # two experts to each token in each layer
            assert min(every) > 0.5 * sum(every) / experts, every
        assert tp > 1 or made["misrouted"] > 0.1  # or the differences above would say little


def rounded(rank, world_size, folder, ids):
    from megatron_comp.commands.evaluate import evaluate
    from megatron_comp.commands.setup import Setting
    from megatron_comp.policy import CompressionPolicy
    from megatron_comp.quality.judge import Judge

    init_parallel(world_size)
    model = build_model(folder)
    settings = [Setting(codec, CompressionPolicy(codec=codec, min_bytes=0)) for codec in ("int8:32:fp16", "mxfp4")]
    only = CompressionPolicy(min_bytes=0, sites={"experts": "mxfp4"})
    rows, _ = evaluate(Judge(model, ids, keep=False), [*settings, Setting("experts", only)])
    return rows


def test_compression_costs_little(dense, mixtral_split):
    for rows in run_ranks(rounded, 2, mixtral_split, dense.ids, timeout=300):
        none, int8, mxfp4, experts = rows
        assert (none["kl"], none["top1_agreement"]) == (0, 1)
        assert 0 < int8["kl"] < 0.01 < mxfp4["kl"] < 1
        assert int8["kl"] < experts["kl"] < mxfp4["kl"]
        assert int8["top1_agreement"] > 0.95
        tokens, hidden, layers = dense.ids.numel(), 576, SHORT
        # Two sums per layer, one of attention and one of experts; with two ranks each gets one message.
        assert mxfp4["bytes_per_rank"] == layers * 2 * tokens * hidden * 4.25 / 8
        assert int8["bytes_per_rank"] == layers * 2 * tokens * hidden * 8.5 / 8
