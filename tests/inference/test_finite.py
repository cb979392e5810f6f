# SPDX-License-Identifier: Apache-2.0
"""Models whose logits are not finite: generate, evaluate, search and drop say where it began, and write nothing."""

import json
import math
import re
import shutil

import pytest
import torch
from characters import character_llama
from checkpoints import tiny_mixtral
from models import message_of
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from megatron_comp.inference.generate import generate, logits
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.layers.apply import apply_compression
from megatron_comp.policy import CompressionPolicy

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def damaged(source, folder, change):
    """A copy of a checkpoint with some of its tensors changed: name -> function."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, make in change.items():
        tensors[name] = make(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def one_nan(weight):
    """In the last value: of the last rank's part."""
    weight = weight.clone()
    weight.view(-1)[-1] = math.nan
    return weight


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return character_llama(tmp_path_factory.mktemp("source"), **SMALL)


LAYER = "model.layers.1."
LARGE = {LAYER + "mlp.up_proj.weight": lambda w: w * 4e4, LAYER + "mlp.down_proj.weight": lambda w: w * 100}

# Name: what is damaged, the dtype it runs in, and what is said of where it began.
CASES = {
    "mlp": (
        {LAYER + "mlp.down_proj.weight": one_nan},
        "float32",
        r"layer 1, mlp \(.*linear_fc2\), in float32: its weight",
    ),
    "gate": (
        {LAYER + "mlp.gate_proj.weight": one_nan},
        "float32",
        r"layer 1, mlp \(.*linear_fc1\), in float32: its wei",
    ),
    "value": (
        {LAYER + "self_attn.v_proj.weight": one_nan},
        "bfloat16",
        r"layer 1, attention \(.*linear_qkv\), in bfloat16: its weight",
    ),
    "output": (
        {LAYER + "self_attn.o_proj.weight": one_nan},
        "float32",
        r"layer 1, attention \(.*linear_proj\), in float",
    ),
    "norm": (
        {"model.layers.0.input_layernorm.weight": one_nan},
        "float32",
        r"layer 0, attention \(.*input_layernorm\)",
    ),
    "embedding": (
        {"model.embed_tokens.weight": lambda w: w * math.inf},
        "float32",
        r"in the embedding \(embedding.word_emb",
    ),
    "head": (
        {"lm_head.weight": one_nan},
        "float32",
        r"in the output layer \(output_layer\), in float32: its weight is not",
    ),
    "last norm": ({"model.norm.weight": one_nan}, "float32", r"in the final norm \(decoder.final_layernorm\)"),
    "overflow": (
        LARGE,
        "float16",
        r"layer 1, mlp \(decoder.layers.1.mlp[.\w]*\), in float16\. Try --dtype bfloat16 or fl",
    ),
}


def messages(rank, world_size, folders, compressed):
    init_parallel(world_size)
    said = {}
    for name, (folder, dtype) in folders.items():
        model = build_model(folder, dtype=getattr(torch, dtype))
        if compressed:
            apply_compression(model, CompressionPolicy(codec="int8:32:fp16", min_bytes=0))
        ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
        said[name] = [
            message_of(generate, model, ids[0], 4),
            message_of(logits, model, ids),
            message_of(logits, model, ids, True),
        ]
    return said


@pytest.mark.parametrize("tp, compressed", [(1, False), (2, False), (2, True)])
def test_says_where_it_began(source, tmp_path, tp, compressed):
    folders = {name: (damaged(source, tmp_path / name, case[0]), case[1]) for name, case in CASES.items()}
    for said in run_ranks(messages, tp, folders, compressed):
        for name, (_, _, expected) in CASES.items():
            for message in said[name]:
                assert message.startswith("the model's logits are not finite: it began in "), (name, message)
                assert re.search(expected, message), (name, message)
                assert ("another codec" in message) is compressed, message


def of_a_mixture(rank, world_size, folder):
    init_parallel(world_size)
    return message_of(generate, build_model(folder), [3, 1, 4, 1, 5, 9], 4)


@pytest.mark.parametrize("tensor, site", [("gate", "experts"), ("experts.{}.w2", "experts")])
def test_in_experts(tmp_path, tensor, site):
    source = tiny_mixtral(tmp_path / "source", num_hidden_layers=2)
    names = {f"model.layers.1.block_sparse_moe.{tensor.format(number)}.weight" for number in range(4)}
    folder = damaged(source, tmp_path / "damaged", dict.fromkeys(names, one_nan))
    for said in run_ranks(of_a_mixture, 2, folder):
        assert f"layer 1, {site} (" in said


def finite(rank, world_size, folder):
    """In bf16, which has the range, it generates."""
    init_parallel(world_size)
    return generate(build_model(folder, dtype=torch.bfloat16), [3, 1, 4, 1, 5, 9], 4).tokens


def test_what_it_advises_helps(source, tmp_path):
    folder = damaged(source, tmp_path / "large", LARGE)
    assert all(len(tokens) == 4 for tokens in run_ranks(finite, 2, folder))


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--prompt", "hello", "--codec", "mxfp4"),
        ("evaluate", "--codec", "mxfp4"),
        ("search", "--max-kl", "0.03", "--out"),
        ("search", "--max-perplexity-increase", "1", "--out"),
        ("drop", "sensitivity"),
    ],
    ids=" ".join,
)
def test_commands(command, source, text, tmp_path, arguments):
    folder = damaged(source, tmp_path / "model", {LAYER + "mlp.down_proj.weight": one_nan})
    policy, rows, state = tmp_path / "policy.yaml", tmp_path / "rows.json", tmp_path / "state.json"
    arguments = [*arguments, policy] if arguments[-1] == "--out" else arguments
    if "generate" not in arguments:
        arguments = [*arguments, "--text", text, "--tokens", 64, "--context", 32]
    if "search" in arguments:
        arguments = [*arguments, "--state", state]
    done = command(*arguments, "--model", folder, "--tp", 2, "--json", rows)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("megatron-comp: error")]
    assert re.search(r"logits are not finite: it began in layer 1, mlp \(", line), line
    assert not state.exists()  # nothing was measured with it
    assert not policy.exists() and not rows.exists(), json.loads(rows.read_text())


@pytest.mark.parametrize("step", ["distill", "group"])
def test_steps_that_write_weights(command, source, text, tmp_path, step):
    folder = damaged(source, tmp_path / "model", {"model.layers.0.mlp.down_proj.weight": one_nan})
    out = tmp_path / "weights.safetensors"
    arguments = ("--model", folder, "--tp", 2, "--text", text, "--tokens", 64, "--context", 32, "--blocks", "1")
    done = command("drop", step, *arguments, "--out", out)
    assert done.returncode == 2, done.stderr
    assert "block 1: its error is not finite, in float32: weights of it or of a block before it" in done.stderr
    assert not out.exists()
