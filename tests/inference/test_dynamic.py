# SPDX-License-Identifier: Apache-2.0
"""Several prompts at once: the dynamic engine on our models says what one prompt at a time says."""

import dynamic_engine
import pytest
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference.dynamic import generate_together
from megatron_comp.inference.generate import generate
from megatron_comp.inference.model import build_model, init_parallel

PROMPTS, NEW = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7], [20] * 12], 6


def together(rank, world_size, ref):
    init_parallel(world_size)
    model, made = build_model(ref.folder), {}
    try:
        generate_together(model, PROMPTS, NEW)
    except ValueError as error:
        made["without flash-attn"] = str(error)
    dynamic_engine.without_cuda()
    made["single"] = [generate(model, prompt, NEW).tokens for prompt in PROMPTS]
    steps = []
    made["together"] = generate_together(model, PROMPTS, NEW, on_step=lambda: steps.append(1))
    made["steps"] = len(steps)
    ends = {made["single"][0][2], made["single"][2][4]}
    made["ends"] = generate_together(model, PROMPTS, NEW, ends).tokens
    made["single ends"] = [generate(model, prompt, NEW, ends).tokens for prompt in PROMPTS]
    mc.apply_compression(model, mc.CompressionPolicy(codec="none", logits=2))
    made["candidates"], made["stats"] = generate_together(model, PROMPTS, NEW).tokens, mc.stats(model)
    made["hooks"] = len(model._forward_hooks)
    return made


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request, tiny):
    return request.param, run_ranks(together, request.param, tiny["llama2"])


def test_prompts_together_are_continued_as_each_alone(ranks):
    for made in ranks[1]:
        assert made["together"].tokens == made["single"] == made["candidates"]
        assert made["steps"] == NEW and made["hooks"] == 0
        assert made["together"].ttft_seconds > 0 and made["together"].decode_seconds > 0
        assert made["ends"] == made["single ends"] != made["single"]


def test_candidates_are_counted(ranks):
    for made in ranks[1]:
        site = made["stats"].sites[-1]
        assert site.site == "logits" and site.compressed.calls + site.kept.calls == NEW
        assert ranks[0] == 1 or site.kept_because == {"prefill": 1}


def test_flash_attn_is_asked_for(ranks):
    assert all("needs flash-attn 2.7.3 or newer, and a GPU" in made["without flash-attn"] for made in ranks[1])
