# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from models import policy
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference.generate import logits
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.quality.judge import Judge, Trial

IDS = torch.randint(0, 128, (3, 32), generator=torch.Generator().manual_seed(1))
TRIALS = [Trial("mxfp4", policy(codec="mxfp4")), Trial("none"), Trial("int8", policy(codec="int8:32:fp16"))]


class Unfit(Trial):
    def apply(self, model):
        super().apply(model)
        raise RuntimeError("unfit")


def figures(judged):
    return [
        (each.nll, each.kl, each.top1_agreement, each.traffic.received_bytes, each.traffic.bits_per_value)
        for each in judged
    ]


def judged_by_ranks(rank, world_size, folder):
    """Side by side; one after another beside kept predictions; and whether the model was left as it was."""
    init_parallel(world_size)
    model = build_model(folder)
    before = logits(model, IDS)
    side_by_side = figures(Judge(model, IDS, keep=False).judge(TRIALS, "all"))
    judge = Judge(model, IDS)
    alone = [figures(judge.judge([trial], trial.name)) for trial in TRIALS]
    with pytest.raises(RuntimeError, match="unfit"):
        judge.judge([Unfit("unfit", TRIALS[0].policy)], "unfit")
    return side_by_side, alone, torch.equal(logits(model, IDS), before) and not mc.stats(model).sites


def test_trials_side_by_side_and_alone_are_judged_alike(llama):
    (base, mxfp4, none, int8), alone, restored = run_ranks(judged_by_ranks, 2, llama)[0]
    assert [one for _, one in alone] == [mxfp4, none, int8] and all(first == base for first, _ in alone)
    assert none == base and base[1:3] == (0, 1) and 0 < int8[1] < mxfp4[1]
    assert (base[4], mxfp4[4], int8[4]) == (32, 4.25, 8.5)
    assert restored
