# SPDX-License-Identifier: Apache-2.0
"""Shared experts, plain and overlapped with the token dispatcher, against stock Megatron."""

import math
from dataclasses import fields

import oracles
import pytest
import torch
from experts import INT8, start
from megatron.core.transformer.transformer_config import TransformerConfig
from models import EXPERT_IDS, experts_model, inside_view, policy, whole_logits
from ranks import run_ranks

import megatron_comp as mc

SHARED = {"moe_shared_expert_intermediate_size": 32}
OVERLAP = SHARED | {"moe_shared_expert_overlap": True, "moe_token_dispatcher_type": "alltoall"}
GATED = {"moe_shared_expert_gate": True}
HAS_GATE = "moe_shared_expert_gate" in {field.name for field in fields(TransformerConfig)}
SHARING = {
    "allgather": SHARED,
    "alltoall": SHARED | {"moe_token_dispatcher_type": "alltoall"},
    "overlap": OVERLAP,
    **({"gate": SHARED | GATED, "overlap-gate": OVERLAP | GATED} if HAS_GATE else {}),
}
KEPT = {"experts": {"sites": {"experts": "none"}}, "shared_experts": {"sites": {"shared_experts": "none"}}}


def shared(rank, world_size, tp, ep):
    """(sharing, scattered) -> logits and stats by policy."""
    made = {}
    with start(tp, ep):
        for name, options in SHARING.items():
            for scattered in (False, True):
                model = experts_model(sequence_parallel=scattered, **options)
                with torch.no_grad():
                    for layer in model.decoder.layers:  # as large as the others' part, so that a mistake shows
                        layer.mlp.shared_experts.linear_fc2.weight.mul_(20)
                got = made[name, scattered] = {"stock": whole_logits(model)}
                before = inside_view(model)
                for policy_name, words in {
                    "all": {"codec": INT8},
                    "none": {"codec": "none"},
                    "experts": {"codec": INT8, "sites": {"shared_experts": "none", "attention": "none"}},
                    "shared_experts": {"codec": INT8, "sites": {"experts": "none", "attention": "none"}},
                    "mxfp4": {"sites": {"experts": "none", "attention": "none"}},
                    "kept": {"min_bytes": 10**9},
                }.items():
                    mc.apply_compression(model, policy(**words))
                    got[policy_name] = whole_logits(model)
                    got[f"{policy_name} stats"] = mc.stats(model).sites
                mc.remove_compression(model)
                assert inside_view(model) == before
                got["removed"] = whole_logits(model)
    return made


@pytest.fixture(scope="module", params=[(2, 1), (2, 2)], ids=["tp2-ep1", "tp2-ep2"])
def sharing(request):
    return run_ranks(shared, math.prod(request.param), *request.param)


@pytest.mark.parametrize("scattered", [False, True], ids=["plain", "sequence_parallel"])
@pytest.mark.parametrize("name", SHARING)
def test_shared_experts(sharing, name, scattered):
    for rank, made in enumerate(sharing):
        got, first = made[name, scattered], sharing[rank - rank % 2][name, scattered]
        stock = got["stock"]
        assert torch.equal(got["none"], stock) and torch.equal(got["removed"], stock)
        torch.testing.assert_close(got["kept"], stock, atol=1e-5, rtol=0)
        for policy_name, sites in {
            "all": {"attention", "experts", "shared_experts"},
            "experts": {"experts"},
            "shared_experts": {"shared_experts"},
            "mxfp4": {"shared_experts"},
        }.items():
            assert torch.equal(got[policy_name], first[policy_name])
            assert not torch.equal(got[policy_name], stock)
            done = [(site.layer, site.site) for site in got[f"{policy_name} stats"] if site.compressed.calls == 1]
            assert sorted(done) == [(layer, site) for layer in (0, 1) for site in sorted(sites)]
            error = (got[policy_name] - stock).abs().mean() / stock.std()
            assert error < (0.4 if policy_name == "mxfp4" else 0.02), policy_name
        assert (got["shared_experts"] - stock).abs().mean() < (got["mxfp4"] - stock).abs().mean() / 4
        for policy_name, reason in (("kept", "min_bytes"), ("none", "policy")):
            kept = [site for site in got[f"{policy_name} stats"] if site.kept_because == {reason: 1}]
            assert sorted((site.layer, site.site) for site in kept) == [
                (layer, site) for layer in (0, 1) for site in ("attention", "experts", "shared_experts")
            ]


def test_shared_experts_send_their_own_tokens_only(sharing):
    """Bytes of one sum of shared experts: those of the ranks' tokens, whatever the experts do."""
    rows, hidden = EXPERT_IDS.numel(), 64
    for made in sharing:
        for (_, scattered), got in made.items():
            for site in got["shared_experts stats"]:
                if site.site == "shared_experts":
                    assert site.compressed.values == rows * hidden
                    assert site.compressed.message_bytes == oracles.message_bytes(INT8, (rows, hidden))
                    received = oracles.message_bytes(INT8, (rows // 2 if scattered else rows, hidden))
                    assert site.compressed.received_bytes == received
