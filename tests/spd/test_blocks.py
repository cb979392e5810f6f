# SPDX-License-Identifier: Apache-2.0
"""Blocks without attention's sum in one process: against Megatron's ranks, their gradients, and distillation."""

from dataclasses import replace

import torch
from drops import IDS, RANKS, streamed
from predictors import tensors, write
from ranks import run_ranks
from safetensors.torch import load_file

import megatron_comp as mc
from megatron_comp.inference.generate import logits
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.layers.predictor_file import read_regressions
from megatron_comp.spd.block import split_columns, split_mlp
from megatron_comp.spd.training import Recipe, distill


def layer_outputs(rank, world_size, folder, predictor):
    """Of the last block, on Megatron's layers: its input and output, then both without attention's sum, then with that
    of other ranks predicted."""
    init_parallel(world_size)
    model, made = build_model(folder), []
    model.decoder.layers[1].register_forward_hook(
        lambda _, args, kwargs, out: made.append((kwargs["hidden_states"], out[0])), with_kwargs=True
    )
    drop = {1: {"attention": "drop"}}
    for words in ({}, {"layers": drop}, {"layers": drop, "predictor": predictor}):
        logits(mc.apply_compression(model, mc.CompressionPolicy(**words)), IDS)
    return made


def test_blocks_compute_what_ranks_do(two_blocks, tmp_path):
    ((block, x, out, rope),) = streamed(two_blocks)
    hidden = x.shape[-1]
    predictor = write(tmp_path / "p.safetensors", tensors(2, hidden, RANKS, sites=["attention"]), RANKS)
    (x_ranks, stock), (_, dropped), (_, predicted) = run_ranks(layer_outputs, RANKS, two_blocks, predictor)[0]
    expected = [t.transpose(0, 1) for t in (x_ranks, stock, dropped, predicted)]
    # The same sums in fp32 in another order.
    torch.testing.assert_close(x, expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out, expected[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(block(x, rope, RANKS), expected[2], atol=1e-4, rtol=1e-4)
    regression = read_regressions(predictor, RANKS, hidden)[1, "attention"]
    torch.testing.assert_close(block(x, rope, RANKS, regression), expected[3], atol=1e-4, rtol=1e-4)
    assert (expected[2] - expected[1]).abs().max() > 0.1 and (expected[3] - expected[2]).abs().max() > 0.1


def test_gradients_come_from_a_ranks_own_mlp(two_blocks):
    """With the output's other parts cut off, a rank's heads learn from its own part of the MLP and from no other's."""
    ((block, x, _, rope),) = streamed(two_blocks)
    layer = block.modules_of
    heads_of = [slice(0, 48), slice(48, 96)]
    with torch.enable_grad():
        for rank in range(RANKS):
            partial = split_columns(block.heads(x, rope), layer.self_attn.o_proj.weight, RANKS)
            normed = layer.post_attention_layernorm(x + partial)
            (gradient,) = torch.autograd.grad(
                split_mlp(layer.mlp, normed, RANKS)[rank].sum(), layer.self_attn.o_proj.weight
            )
            assert gradient[:, heads_of[rank]].abs().max() > 0 and gradient[:, heads_of[1 - rank]].abs().max() == 0


def trained(folder, recipe):
    ((block, x, out, rope),) = streamed(folder)
    log, summary = distill(block, x, out, rope, recipe)
    return block.named(), log, summary


def test_distillation_learns_and_is_deterministic(two_blocks):
    recipe = Recipe(RANKS, epochs=6, batch=2, learning_rate=3e-3)
    first, log, summary = trained(two_blocks, recipe)
    again, *_ = trained(two_blocks, recipe)
    other, *_ = trained(two_blocks, replace(recipe, seed=2))
    assert first.keys() == {name for name in load_file(two_blocks / "model.safetensors") if ".layers.1." in name}
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert [line["epoch"] for line in log] == list(range(6)) and log[-1]["loss"] < log[0]["loss"]
    assert summary["mse_after"] < 0.5 * summary["mse_before"]
    assert summary["relative_after"] < summary["relative_before"]
