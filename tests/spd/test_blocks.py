# SPDX-License-Identifier: Apache-2.0
"""Blocks without attention's sum in one process: against Megatron's ranks, their gradients, and distillation."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from drops import IDS, RANKS, streamed
from predictors import tensors, write
from ranks import run_ranks
from safetensors.torch import load_file

import megatron_comp as mc
from megatron_comp.inference.generate import logits
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.layers.predictor_file import Regression, read_regressions
from megatron_comp.spd.block import split_columns, split_mlp
from megatron_comp.spd.regression import fit_response
from megatron_comp.spd.training import Recipe, distill


def layer_outputs(rank, world_size, folder, *files):
    """Of the last block, on Megatron's layers: its input and output, then both without attention's sum, then with that
    of other ranks predicted by each file."""
    init_parallel(world_size)
    model, made = build_model(folder), []
    model.decoder.layers[1].register_forward_hook(
        lambda _, args, kwargs, out: made.append((kwargs["hidden_states"], out[0])), with_kwargs=True
    )
    drop = {1: {"attention": "drop"}}
    for words in ({}, {"layers": drop}, *({"layers": drop, "predictor": file} for file in files)):
        logits(mc.apply_compression(model, mc.CompressionPolicy(**words)), IDS)
    return made


def test_blocks_compute_what_ranks_do(two_blocks, tmp_path):
    ((block, x, out, rope),) = streamed(two_blocks)
    hidden = x.shape[-1]
    files = [
        write(tmp_path / f"{scale}.safetensors", tensors(2, hidden, RANKS, sites=["attention"], response=scale), RANKS)
        for scale in (0.0, 0.2)
    ]
    made = run_ranks(layer_outputs, RANKS, two_blocks, *files)[0]
    x_ranks, (stock, dropped, *predicted) = made[0][0], ([out for _, out in made])
    torch.testing.assert_close(x, x_ranks.transpose(0, 1), atol=1e-4, rtol=1e-4)
    regressions = [read_regressions(file, RANKS, hidden)[1, "attention"] for file in files]
    ours = [out, block(x, rope, RANKS), *(block(x, rope, RANKS, each) for each in regressions)]
    # The same sums in fp32 in another order.
    for mine, ranks in zip(ours, (stock, dropped, *predicted), strict=True):
        torch.testing.assert_close(mine, ranks.transpose(0, 1), atol=1e-4, rtol=1e-4)
    assert all((one - other).abs().max() > 0.1 for one, other in pairwise(ours))


def test_the_response_makes_up_for_what_other_ranks_do_not_see(two_blocks):
    """On windows that the fit has not seen, without a prediction: residuals are then as large as the sums. A gate that
    is always open makes the MLP linear in its normed input, so that what is left is the ridge's and the norm's."""
    ids = torch.randint(0, 128, (60, 24), generator=torch.Generator().manual_seed(4))
    ((block, x, _, rope),) = streamed(two_blocks, ids=ids)
    block.modules_of.mlp.act_fn = torch.nn.Threshold(math.inf, 1.0)
    zeros = torch.zeros(RANKS, 1, x.shape[-1])
    nothing = Regression(zeros[0].t(), torch.zeros(1), zeros, zeros[:, 0])
    response, left = fit_response(block, x, rope, nothing, x.shape[-1], 20)
    with torch.no_grad():
        without, with_it = (
            (block(x[-20:], rope, RANKS, nothing._replace(response=each)) - block(x[-20:], rope)).square().sum().item()
            for each in (None, response)
        )
    assert left < 0.6
    assert with_it == pytest.approx(left * without, rel=0.1)


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
