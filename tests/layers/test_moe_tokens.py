# SPDX-License-Identifier: Apache-2.0
"""Experts whose ranks hold other tokens than their neighbours, none at all, dropped ones, or half-precision ones."""

from unittest.mock import patch

import oracles
import pytest
import torch
from experts import DISPATCHERS, HIDDEN, INT8, cases, of_experts, start, uneven_collectives
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from models import experts_model, policy, whole_logits
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference import cpu
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.layers import reducer
from megatron_comp.wire.collectives import run


@torch.no_grad()
def expert_tensor_parallel(rank, world_size, tp, expert_tp):
    """dispatcher -> (stock, compressed, stats) of a layer whose experts are split otherwise than attention."""
    cpu.prepare()
    cpu.prepare_streams()
    parallel_state.initialize_model_parallel(tp, expert_tensor_parallel_size=expert_tp)
    model_parallel_cuda_manual_seed(1, inference_rng_tracker=True, force_reset_rng=True)
    made = {}
    with uneven_collectives():
        for dispatcher in DISPATCHERS:
            model = experts_model(moe_token_dispatcher_type=dispatcher)
            torch.manual_seed(rank // tp)
            x, layer = torch.randn(5, 2, 64), model.decoder.layers[0].mlp
            stock, _ = layer(x)
            mc.apply_compression(model, policy(codec=INT8))
            made[dispatcher] = stock, layer(x)[0], of_experts(mc.stats(model))
    return made


@pytest.mark.parametrize("tp, expert_tp", [(1, 2), (2, 1), (4, 2)], ids=["1-over-2", "2-over-1", "4-over-2"])
def test_experts_split_otherwise_than_attention(tp, expert_tp):
    """Over more ranks, some of these hold another data-parallel rank's tokens."""
    for made in run_ranks(expert_tensor_parallel, max(tp, expert_tp), tp, expert_tp):
        for stock, ours, sites in made.values():
            torch.testing.assert_close(ours, stock, atol=0.02 * stock.std().item(), rtol=0)
            assert torch.equal(ours, stock) == (expert_tp == 1)
            assert [site.compressed.calls for site in sites] == ([1, 0] if expert_tp > 1 else [])


@torch.no_grad()
def few_tokens(rank, world_size, folder):
    """One token a rank, which may all go to the experts of other ranks: (stock, compressed, splits), many times."""
    made = []
    with start(2, 2):
        model = build_model(folder, token_dispatcher="alltoall", sequence_parallel=True)
        layer = model.decoder.layers[0].mlp
        for seed in range(6):
            torch.manual_seed(10 * seed + rank)
            x = torch.randn(1, 1, HIDDEN)
            mc.remove_compression(model)
            stock, _ = layer(x)
            mc.apply_compression(model, policy(codec=INT8))
            ours, _ = layer(x)
            (site, *_) = of_experts(mc.stats(model))
            made.append((stock, ours, layer.token_dispatcher.output_splits_tp.tolist(), site.compressed))
    return made


def test_ranks_without_a_token_for_their_experts(mixtrals):
    ranks = run_ranks(few_tokens, 4, mixtrals[4].folder)
    for rank, made in enumerate(ranks):
        for stock, ours, splits, traffic in made:
            torch.testing.assert_close(ours, stock, atol=0.03 * stock.std().item(), rtol=0)
            assert (traffic.values, traffic.calls) == (sum(splits) * HIDDEN, 1)
            assert traffic.received_bytes == oracles.message_bytes(INT8, (splits[rank % 2], HIDDEN))
    assert any(0 in splits and sum(splits) for made in ranks for *_, splits, _ in made)


@torch.no_grad()
def half_precision(rank, world_size, folder):
    """Hidden states in bf16, the router's probabilities in fp32: (types of what is encoded, stock, ours, stats)."""
    made = {}
    with start(world_size, 1):
        for case in cases(world_size):
            dispatcher, scattered = case
            model = build_model(folder, dtype=torch.bfloat16, token_dispatcher=dispatcher, sequence_parallel=scattered)
            layer = model.decoder.layers[0].mlp
            torch.manual_seed(rank if scattered else 0)
            x = torch.randn(4, 2, HIDDEN).bfloat16()
            stock, _ = layer(x)
            types = set()

            def noted(plan, partial, *args, types=types):
                types.add(partial.dtype)
                return run(plan, partial, *args)

            mc.apply_compression(model, policy(codec=INT8))
            with patch.object(reducer, "run", noted):
                ours, _ = layer(x)
            mc.apply_compression(model, policy(min_bytes=10**9))
            kept, _ = layer(x)
            made[case] = types, stock, ours, kept, of_experts(mc.stats(model))[0].kept
    return made


def test_sums_are_taken_in_the_type_of_the_routers_probabilities(mixtrals):
    for made in run_ranks(half_precision, 2, mixtrals[4].folder):
        for types, stock, ours, kept, traffic in made.values():
            assert types == {torch.float32}
            assert stock.dtype == ours.dtype == kept.dtype == torch.bfloat16
            # Eight significant bits of bf16, and a little more than that of int8.
            torch.testing.assert_close(ours.float(), stock.float(), atol=0.03 * stock.std().item(), rtol=2**-7)
            torch.testing.assert_close(kept.float(), stock.float(), atol=0.01 * stock.std().item(), rtol=2**-7)
            assert traffic.message_bytes == traffic.values * 4 and traffic.values % (8 * HIDDEN) == 0


@torch.no_grad()
def capacity(rank, world_size):
    """Tokens beyond an expert's capacity are dropped: (stock, compressed) of a dispatcher that pads to it."""
    init_parallel(world_size)
    model = experts_model(
        moe_token_dispatcher_type="alltoall", moe_expert_capacity_factor=0.5, moe_pad_expert_input_to_capacity=True
    )
    stock = whole_logits(model)
    mc.apply_compression(model, policy(codec=INT8))
    return stock, whole_logits(model), whole_logits(mc.apply_compression(model, policy(codec="none")))


def test_experts_with_a_capacity(record_property):
    ranks = run_ranks(capacity, 2)
    for stock, ours, none in ranks:
        assert torch.equal(none, stock) and torch.equal(ours, ranks[0][1])
        assert 0 < (ours - stock).abs().mean() < 0.02 * stock.std()
