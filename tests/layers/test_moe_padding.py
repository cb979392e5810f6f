# SPDX-License-Identifier: Apache-2.0
"""Mixtures whose decoded tokens are padded to a capacity: Megatron's engines switch this on and off between steps."""

import math

import pytest
import torch
from experts import INT8, of_experts, start
from megatron.core.inference import utils
from models import experts_model, policy, whole_logits
from ranks import run_ranks

import megatron_comp as mc

EXPERTS, TOPK = 4, 2  # of `experts_model`
PROMPT = torch.arange(16).view(2, 8)
STEPS = [(False, PROMPT), (True, PROMPT[:, :2]), (True, PROMPT[:, 4:6]), (False, PROMPT), (True, PROMPT[:, :2])]
SETUPS = [(2, 1), (2, 2), (1, 2)]  # tensor-parallel x expert-parallel ranks


def all_steps(model):
    """Logits of every step, padded as Megatron's text-generation controller pads: no token is dropped."""
    utils.moe_layer_cache = None  # of the model before
    made = []
    for padded, ids in STEPS:
        utils.set_decode_expert_padding(model, padded, EXPERTS / TOPK if padded else None)
        made.append(whole_logits(model, ids))
    return made


def padded(rank, world_size, tp, ep):
    made = {}
    with start(tp, ep):
        for dispatcher in ("alltoall", "allgather"):
            for scattered in (False, True) if tp > 1 else (False,):
                model = experts_model(moe_token_dispatcher_type=dispatcher, sequence_parallel=scattered)
                got = made[dispatcher, scattered] = {"stock": all_steps(model)}
                for name, words in {"none": {"codec": "none"}, "int8": {"codec": INT8}}.items():
                    mc.apply_compression(model, policy(**words))
                    got[name], got[f"{name} stats"] = all_steps(model), mc.stats(model)
                # Restored while rows are padded: the stock dispatcher goes on with padding.
                mc.remove_compression(model)
                got["padded after"] = whole_logits(model, STEPS[-1][1])
                got["removed"] = all_steps(model)
    return made


@pytest.fixture(scope="module", params=SETUPS, ids=lambda setup: "tp{}-ep{}".format(*setup))
def setup(request):
    return request.param, run_ranks(padded, math.prod(request.param), *request.param)


def test_uncompressed_and_removed_are_stock(setup):
    for made in setup[1]:
        for case, got in made.items():
            for name in ("none", "removed"):
                assert all(map(torch.equal, got[name], got["stock"])), (case, name)
            assert torch.equal(got["padded after"], got["stock"][-1]), case


def test_every_step_is_compressed(setup):
    (tp, ep), ranks = setup
    for rank, made in enumerate(ranks):
        for case, got in made.items():
            first = ranks[rank - rank % tp][case]
            sums = tp * ep > 1 if case[0] == "allgather" else tp > 1
            sites = of_experts(got["int8 stats"])
            assert len(sites) == (2 if sums else 0), case
            assert all(site.compressed.calls == len(STEPS) and site.kept.calls == 0 for site in sites), case
            for step, stock in enumerate(got["stock"]):
                ours = got["int8"][step]
                assert torch.equal(ours, first["int8"][step]), case
                error = (ours - stock).abs().median() / stock.std()
                assert (1e-5 < error < 0.04) if tp * ep > 1 and (sums or tp > 1) else error == 0, (case, step, error)
