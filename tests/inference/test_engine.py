# SPDX-License-Identifier: Apache-2.0
"""Megatron's own engines, in a script that knows Megatron alone, on the first layers of a real Llama.

The dynamic engine needs a GPU for its attention: here that is plain torch, see `support/dynamic_engine.py`.
"""

import copy
import importlib.util
import os
import sys
from collections import Counter
from pathlib import Path

import commands
import dynamic_engine
import pytest
from checkpoints import SHORT
from megatron.core.inference.sampling_params import SamplingParams
from models import policy
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference.model import init_parallel

REPO = Path(__file__).parents[2]
SCRIPT = REPO / "examples" / "stock_engine.py"
STOOD_IN = REPO / "tests" / "support" / "dynamic_engine.py"
RANKS, SITES, NEW = 3, 2 * SHORT, 6
# Of 11 and 13 tokens: the static engine reads the rest of the longer prompt token by token, and only then decodes. The
# dynamic engine reads both at once.
PROMPTS = [
    "The three branches of the government of the United States are",
    "The capital of France, Paris, is known for its museums and",
]
PREFILL, DECODE = {"static": SITES * 3, "dynamic": SITES}, SITES * (NEW - 1)
HIDDEN, VOCABULARY = 576, 49152
DECODE_STAYS = {"codec": "int8:32:fp16", "algorithm": "gather_sum", "phases": {"decode": "none"}}


def in_one_process(rank, world_size, folder, kind):
    """The script's own functions, with compression switched in between."""
    init_parallel(world_size)
    spec = importlib.util.spec_from_file_location("stock_engine", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.without_cuda()
    dynamic_engine.without_cuda()
    engine = script.build_engine(str(folder), len(PROMPTS), kind)
    model, made = engine.controller.inference_wrapped_model.model, {"stock": script.texts(engine, PROMPTS, NEW)}
    made["sampled stock"] = sampled(engine)
    for name, words in {
        "none": {"codec": "none", "logits": VOCABULARY},
        "int8": {"codec": "int8:32:fp16"},
        "decode stays": DECODE_STAYS,
        "int2": {"codec": "int2:32:fp16"},
        "one logit": {"codec": "none", "logits": 1},
    }.items():
        mc.apply_compression(model, policy(**words))
        made[name] = script.texts(engine, PROMPTS, NEW)
        made[f"{name} stats"] = copy.deepcopy(mc.stats(model))
    mc.apply_compression(model, policy(codec="none", logits=16))
    made["sampled"] = sampled(engine)
    if kind == "dynamic":
        mc.apply_compression(model, policy(**DECODE_STAYS | {"min_bytes": "100k", "logits": 1}))
        made["steps"] = list(one_request_after_the_other(engine, model))
    return made


def sampled(engine):
    """Tokens drawn from the eight most likely ones."""
    engine.controller.sampling_rng.manual_seed(7)
    of_eight = SamplingParams(top_k=8, temperature=1.5, num_tokens_to_generate=NEW)
    made = engine.generate(PROMPTS, sampling_params=of_eight)
    return [(each.merge() if hasattr(each, "merge") else each).generated_text for each in made]


def one_request_after_the_other(engine, model):
    """By step of the engine: whether it was all decoding, and what it counted."""
    greedy = {"top_k": 1, "num_tokens_to_generate": 4}
    calls = mc.stats(model)
    for step in range(6):
        if step in (0, 2):
            engine.add_request(int(next(engine.request_counter)), PROMPTS[step // 2], SamplingParams(**greedy))
        engine.step_modern()
        before, calls = calls, mc.stats(model)
        sums = slice(0, SITES)
        yield {
            "compressed": sum(site.compressed.calls for site in calls.sites[sums])
            - sum(site.compressed.calls for site in before.sites[sums]),
            "kept because": sum((site.kept_because for site in calls.sites[sums]), Counter())
            - sum((site.kept_because for site in before.sites[sums]), Counter()),
            "values": calls.sites[0].compressed.values
            + calls.sites[0].kept.values
            - before.sites[0].compressed.values
            - before.sites[0].kept.values,
            "logits compressed": calls.sites[-1].compressed.values - before.sites[-1].compressed.values,
            "logits kept": calls.sites[-1].kept.values - before.sites[-1].kept.values,
        }
    assert not engine.has_unfinished_requests()


@pytest.fixture(scope="module")
def both(smollm2_short):
    kinds = ("static", "dynamic")
    return {kind: run_ranks(in_one_process, RANKS, smollm2_short, kind, timeout=300) for kind in kinds}


@pytest.fixture(params=["static", "dynamic"])
def engines(request, both):
    return request.param, both[request.param]


def test_both_engines_say_the_same(both):
    static, dynamic = (made[0]["stock"] for made in both.values())
    assert static == dynamic and all(text.startswith(prompt) for text, prompt in zip(static, PROMPTS))


def test_the_engine_without_compression_says_the_same(engines):
    kind, everyones = engines
    for made in everyones:
        assert made["none"] == made["stock"] == everyones[0]["stock"]
        assert made["none stats"].kept_because == {
            "policy": PREFILL[kind] + DECODE,
            "prefill": PREFILL[kind] // SITES,
            "as many bytes": NEW - 1,
        }


def test_the_engine_compresses_and_all_ranks_say_the_same(engines):
    kind, everyones = engines
    for made in everyones:
        assert made["int8 stats"].compressed.calls == PREFILL[kind] + DECODE and made["int8 stats"].kept.calls == 0
        for name in ("int8", "decode stays", "int2"):
            assert made[name] == everyones[0][name]
            assert all(text.startswith(prompt) for text, prompt in zip(made[name], PROMPTS))
        assert made["int2"] != made["stock"]


def test_the_engine_tells_prefill_from_decode(engines):
    kind, everyones = engines
    for made in everyones:
        stats = made["decode stays stats"]
        assert stats.compressed.calls == PREFILL[kind]
        assert stats.kept_because == {"policy": DECODE}


def test_a_few_logits_are_enough_for_greedy_and_for_top_k(engines):
    kind, everyones = engines
    for made in everyones:
        assert made["one logit"] == made["stock"]
        assert made["sampled"] == made["sampled stock"] != [text[len(p) :] for text, p in zip(made["stock"], PROMPTS)]
        few, all_of_them = made["one logit stats"].sites[-1], made["none stats"].sites[-1]
        assert few.compressed.calls == NEW - 1
        assert few.kept_because == {"prefill": PREFILL[kind] // SITES}
        assert few.compressed.values == (NEW - 1) * len(PROMPTS) * VOCABULARY
        assert few.compressed.received_bytes == (NEW - 1) * len(PROMPTS) * (RANKS - 1) * (4 + 4)
        decoded = all_of_them.kept.received_bytes - few.kept.received_bytes
        assert decoded == (NEW - 1) * len(PROMPTS) * (RANKS - 1) * VOCABULARY // RANKS * 4


def test_steps_that_mix_prefill_and_decode_are_prefill(engines):
    kind, everyones = engines
    if kind == "static":
        pytest.skip("the static engine has no such steps")
    for made in everyones:
        steps = made["steps"]
        # A request is added before the first step and before the third, which goes on with the first one too.
        assert [step["compressed"] for step in steps] == [SITES if prefill else 0 for prefill in (1, 0, 1, 0, 0, 0)]
        # One token is padded to 66 rows of 152 KB in all: by size alone its sums would be compressed.
        assert [step["values"] // HIDDEN for step in steps] == [66] * 6
        for prefill, step in zip((1, 0, 1, 0, 0, 0), steps):
            assert step["kept because"] == ({} if prefill else {"policy": SITES})
        # Logits are of requests, not of padding.
        assert [step["logits kept"] // VOCABULARY for step in steps] == [1, 0, 2, 0, 0, 0]
        assert [step["logits compressed"] // VOCABULARY for step in steps] == [0, 1, 0, 2, 1, 1]


def test_the_script_as_it_is(engines, smollm2_short, tmp_path):
    kind, everyones = engines
    file = tmp_path / "policy.yaml"
    file.write_text("codec: int8:32:fp16\nalgorithm: gather_sum\nmin_bytes: 0\nphases: {decode: none}\nlogits: 1\n")
    script = [SCRIPT] if kind == "static" else [STOOD_IN, SCRIPT]
    command = [sys.executable, "-m", "megatron_comp.run", "--policy", file, *script, "--model", smollm2_short]
    command += ["--engine", kind, "--new-tokens", NEW]
    command += [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    done = commands.run(commands.on_ranks(RANKS, command), environment)
    assert done.returncode == 0, done.stderr[-3000:]
    texts = [line for line in done.stdout.splitlines() if line.startswith(("'The", '"The'))]
    assert texts == [repr(text) for text in everyones[0]["decode stays"]]
    warned, built, sent = [line for line in done.stderr.splitlines() if line.startswith("megatron_comp: ")]
    assert warned.endswith("Log-probabilities and top-p sampling would be wrong")
    assert built.startswith(f"megatron_comp: GPTModel: {SITES} of {SITES} sums have a codec, policy {{")
    prompts = PREFILL[kind] // SITES
    assert f"GPTModel: {PREFILL[kind] + NEW - 1:,} sums and gathers of logits compressed (" in sent
    assert f", {DECODE + prompts:,} uncompressed (policy {DECODE:,}, prefill {prompts})" in sent
