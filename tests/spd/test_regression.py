# SPDX-License-Identifier: Apache-2.0
"""Least squares of partial sums on a block's input: exact where they follow from it, checked where they do not."""

import pytest
import torch

from megatron_comp.layers.predictor import normalized
from megatron_comp.spd.regression import Moments, fit

HIDDEN, RANKS, K = 12, 2, 3


def moments(x, y):
    made = Moments()
    for window in range(len(x)):
        made.add(x[window][None], y[:, window][:, None])
    return made


def draw(windows=8, tokens=50, noise=0.0, seed=0):
    """Inputs `[windows, tokens, hidden]`, and partial sums of rank K on them `[ranks, windows, tokens, hidden]`."""
    rule, new = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    down = torch.randn(HIDDEN, K, generator=rule)
    up, bias = torch.randn(RANKS, 1, K, HIDDEN, generator=rule), torch.randn(RANKS, 1, 1, HIDDEN, generator=rule)
    x = torch.randn(windows, tokens, HIDDEN, generator=new) * 5
    y = normalized(x) @ down @ up + bias
    return x, y + noise * torch.randn(y.shape, generator=new)


def predicted(site, x):
    return normalized(x) @ site.down @ site.up[:, None] + site.bias[:, None, None]


def test_what_follows_from_the_input_is_found():
    site = fit(moments(*draw()), moments(*draw(2, seed=1)), RANKS, K)
    assert site.left < 1e-3
    x, y = draw(2, seed=2)
    torch.testing.assert_close(predicted(site, x), y, rtol=0, atol=0.05)


def test_noise_is_what_is_left():
    x, y = draw(2, seed=1, noise=1.0)
    site = fit(moments(*draw(40, noise=1.0)), moments(x, y), RANKS, K)
    assert site.left == pytest.approx(float(1.0 / y.square().mean()), rel=0.1)
    nothing = fit(moments(torch.randn(8, 50, HIDDEN), torch.randn(RANKS, 8, 50, HIDDEN)), moments(x, y), RANKS, K)
    assert nothing.left > 0.95


def test_lower_ranks_leave_more_and_the_full_one_leaves_what_least_squares_leaves():
    x, y = draw(40, noise=0.5)
    left = [fit(moments(x, y), moments(x, y), RANKS, k).left for k in (1, 2, 3, HIDDEN)]
    assert left == sorted(left, reverse=True) and left[0] > 2 * left[2]
    u = torch.cat([normalized(x), torch.ones(*x.shape[:-1], 1)], -1).flatten(0, 1)
    flat = y.permute(1, 2, 0, 3).reshape(len(u), -1)
    residual = flat - u @ torch.linalg.lstsq(u, flat).solution
    assert left[3] == pytest.approx(float(residual.square().sum() / flat.square().sum()), rel=0.02)


def test_a_few_huge_tokens_do_not_decide():
    x, y = draw(noise=0.1)
    y[:, :, 0] *= -1000
    site = fit(moments(x, y), moments(*draw(2, seed=1)), RANKS, K)
    assert site.left < 0.1
