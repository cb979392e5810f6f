# SPDX-License-Identifier: Apache-2.0
import random

import pytest
import torch
from models import policy
from ranks import run_ranks

from megatron_comp.commands import setup
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.quality.judge import Judge, Trial
from megatron_comp.quality.metrics import perplexity
from research import needle, positions


def test_a_needle_stands_at_its_depth_and_the_text_is_of_its_length():
    sentences = [f"Sentence {number} has five words." for number in range(100)]
    lengths = [6] * 100
    for depth in (0, 50, 100):
        made = needle.item(sentences, lengths, 300, depth, random.Random(1))
        colour = made["choices"][made["gold"]]
        text, _, question = made["context"].partition("\n\n")
        parts = text.split(f" is {colour}.")
        assert len(parts) == 2 and colour not in question and len(set(made["choices"])) == needle.CHOICES
        before, after = (part.count("Sentence") for part in parts)
        assert before + after == (300 - 60) // 6 and before == pytest.approx(depth / 100 * (before + after), abs=1)


def test_ranges_cover_every_position_that_predicts():
    assert positions.ranges(8192) == [(0, 256), (256, 512), (512, 1024), (1024, 2048), (2048, 4096), (4096, 8191)]
    assert positions.ranges(100) == [(0, 99)]


def by_ranks(rank, world_size, folder, windows):
    """By position, and all positions as the judge has them."""
    init_parallel(world_size)
    model = build_model(folder)
    setting = setup.Setting("mxfp4", policy(codec="mxfp4"))
    *_, found = positions.by_position(model, windows, [setup.NONE, setting])
    return found, Judge(model, windows).judge([Trial("mxfp4", setting.policy)], "all")[1]


def test_positions_add_up_to_what_the_judge_says(llama, monkeypatch):
    windows = torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(1))
    found, judged = run_ranks(by_ranks, 2, llama, windows)[0]
    assert [(row["codec"], row["tokens"]) for row in found] == [("none", 62), ("mxfp4", 62)]
    expected = {"kl": judged.kl, "perplexity": perplexity(judged.nll), "top1_agreement": judged.top1_agreement}
    assert {key: found[1][key] for key in expected} == pytest.approx(expected)
    assert found[0]["kl"] == 0
