"""Megatron's own StaticInferenceEngine, in a script that knows Megatron alone, on a real pretrained Llama."""

import copy
import importlib.util
import os
import sys
from pathlib import Path

import commands
import pytest
from models import policy
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference.model import init_parallel

REPO = Path(__file__).parents[2]
SCRIPT = REPO / "examples" / "stock_engine.py"
RANKS, SITES, NEW = 3, 60, 6
# Of 11 and 13 tokens: the engine reads the rest of the longer prompt token by token, and only then decodes.
PROMPTS = [
    "The three branches of the government of the United States are",
    "The capital of France, Paris, is known for its museums and",
]
PREFILL, DECODE = SITES * 3, SITES * (NEW - 1)
DECODE_STAYS = {"codec": "int8:32:fp16", "algorithm": "gather_sum", "phases": {"decode": "none"}}


def in_one_process(rank, world_size, folder):
    """The script's own functions, with compression switched in between."""
    init_parallel(world_size)
    spec = importlib.util.spec_from_file_location("stock_engine", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.without_cuda()
    engine = script.build_engine(str(folder), len(PROMPTS))
    model, made = engine.controller.inference_wrapped_model.model, {"stock": script.texts(engine, PROMPTS, NEW)}
    for name, words in {
        "none": {"codec": "none"},
        "int8": {"codec": "int8:32:fp16"},
        "decode stays": DECODE_STAYS,
        "int2": {"codec": "int2:32:fp16"},
    }.items():
        mc.apply_compression(model, policy(**words))
        made[name] = script.texts(engine, PROMPTS, NEW)
        made[f"{name} stats"] = copy.deepcopy(mc.stats(model))
    return made


@pytest.fixture(scope="module")
def engines(smollm2):
    return run_ranks(in_one_process, RANKS, smollm2)


def test_the_engine_without_compression_says_the_same(engines):
    for made in engines:
        assert made["none"] == made["stock"] == engines[0]["stock"]
        assert made["none stats"].kept_because == {"policy": PREFILL + DECODE}


def test_the_engine_compresses_and_all_ranks_say_the_same(engines):
    for made in engines:
        assert made["int8 stats"].compressed.calls == PREFILL + DECODE and made["int8 stats"].kept.calls == 0
        for name in ("int8", "decode stays", "int2"):
            assert made[name] == engines[0][name]
            assert all(text.startswith(prompt) for text, prompt in zip(made[name], PROMPTS))
        assert made["int2"] != made["stock"]


def test_the_engine_tells_prefill_from_decode(engines):
    for made in engines:
        stats = made["decode stays stats"]
        assert stats.compressed.calls == PREFILL
        assert stats.kept_because == {"policy": DECODE}


def test_the_script_as_it_is(engines, smollm2, tmp_path):
    file = tmp_path / "policy.yaml"
    file.write_text("codec: int8:32:fp16\nalgorithm: gather_sum\nmin_bytes: 0\nphases: {decode: none}\n")
    command = [sys.executable, "-m", "megatron_comp.run", "--policy", file, SCRIPT, "--model", smollm2]
    command += ["--new-tokens", NEW, *(word for prompt in PROMPTS for word in ("--prompt", prompt))]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    done = commands.run(commands.on_ranks(RANKS, command), environment)
    assert done.returncode == 0, done.stderr[-3000:]
    texts = [line for line in done.stdout.splitlines() if line.startswith(("'The", '"The'))]
    assert texts == [repr(text) for text in engines[0]["decode stays"]]
    built, sent = [line for line in done.stderr.splitlines() if line.startswith("megatron_comp: ")]
    assert built.startswith("megatron_comp: GPTModel: 60 of 60 sums have a codec, policy {")
    assert f", {DECODE} uncompressed (policy {DECODE})" in sent and f"GPTModel: {PREFILL} sums compressed (" in sent
