# SPDX-License-Identifier: Apache-2.0
"""Least squares of partial sums on a block's input: exact where they follow from it, checked where they do not."""

import pytest
import torch

from megatron_comp.layers.predictor_file import normalized
from megatron_comp.spd.regression import Moments, fit

HIDDEN, RANKS, K = 12, 2, 3


def moments(x, y):
    made = Moments()
    for window in range(len(x)):
        made.add(normalized(x[window][None]), y[:, window][:, None], x[window][None])
    return made


def draw(windows=8, tokens=50, noise=0.0, seed=0):
    """Inputs `[windows, tokens, hidden]`, and partial sums of rank K on them `[ranks, windows, tokens, hidden]`."""
    rule, new = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    down = torch.randn(HIDDEN, K, generator=rule)
    up, bias = torch.randn(RANKS, 1, K, HIDDEN, generator=rule), torch.randn(RANKS, 1, 1, HIDDEN, generator=rule)
    x = torch.randn(windows, tokens, HIDDEN, generator=new) * 5
    y = normalized(x) @ down @ up + bias
    return x, y + noise * torch.randn(y.shape, generator=new)


def predicted(site, x, k=K):
    return site.regression.cut(k).partial_sums(x)


def test_what_follows_from_the_input_is_found():
    site = fit(moments(*draw()), moments(*draw(2, seed=1)), RANKS, K)
    assert site.left[-1] < 1e-3
    x, y = draw(2, seed=2)
    torch.testing.assert_close(predicted(site, x), y, rtol=0, atol=0.05)
    small = (normalized(x) @ site.regression.down - site.regression.mean).flatten(0, 1)
    torch.testing.assert_close(small.std(0), torch.ones(K), rtol=0, atol=0.2)


def test_noise_is_what_is_left():
    x, y = draw(2, seed=1, noise=1.0)
    site = fit(moments(*draw(40, noise=1.0)), moments(x, y), RANKS, K)
    assert site.left[-1] == pytest.approx(float(1.0 / y.square().mean()), rel=0.1)
    nothing = fit(moments(torch.randn(8, 50, HIDDEN), torch.randn(RANKS, 8, 50, HIDDEN)), moments(x, y), RANKS, K)
    assert nothing.left[-1] > 0.95


def test_lower_ranks_leave_more_and_the_full_one_leaves_what_least_squares_leaves():
    x, y = draw(40, noise=0.5)
    left = [fit(moments(x, y), moments(x, y), RANKS, k).left[-1] for k in (1, 2, 3, HIDDEN)]
    assert left == sorted(left, reverse=True) and left[0] > 2 * left[2]
    u = torch.cat([normalized(x), torch.ones(*x.shape[:-1], 1)], -1).flatten(0, 1)
    flat = y.permute(1, 2, 0, 3).reshape(len(u), -1)
    residual = flat - u @ torch.linalg.lstsq(u, flat).solution
    assert left[3] == pytest.approx(float(residual.square().sum() / flat.square().sum()), rel=0.02)


def test_a_few_huge_tokens_do_not_decide():
    x, y = draw(noise=0.1)
    y[:, :, 0] *= -1000
    site = fit(moments(x, y), moments(*draw(2, seed=1)), RANKS, K)
    assert site.left[-1] < 0.1


def test_the_first_columns_are_the_predictor_of_a_smaller_rank():
    x, y = draw(40, noise=0.5)
    new, new_y = draw(2, seed=1, noise=0.5)
    site, small = (fit(moments(x, y), moments(new, new_y), RANKS, k) for k in (K, 1))
    assert site.left[:2] == pytest.approx(small.left)
    torch.testing.assert_close(predicted(site, new, 1), predicted(small, new, 1), rtol=0, atol=1e-4)
    for k, left in enumerate(site.left):
        rest = new_y - predicted(site, new, k)
        assert left == pytest.approx(float(rest.square().sum() / new_y.square().sum()), rel=0.05)


def test_a_sum_weighs_as_much_as_it_is_of_what_it_is_added_to():
    x, y = draw(noise=1.0)
    weights = [fit(moments(x, factor * y), moments(x, factor * y), RANKS, K).weight for factor in (1e-3, 1e-2)]
    assert weights[1] == pytest.approx(100 * weights[0], rel=0.05)
    assert weights[0] == pytest.approx(1e-6 * float((y.square().sum((0, 3)) / x.square().sum(2)).mean()), rel=0.05)
