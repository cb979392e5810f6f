# SPDX-License-Identifier: Apache-2.0
"""How ranks' partial sums follow from their block's input: least squares of low rank, for `layers/predictor.py`.

A site's regression is checked on windows that it has not seen; the ridge is the one that leaves the least there. So is
what an MLP makes of the rest of attention's sum, where that sum is dropped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..layers.predictor_file import Regression, Response, normalized
from .block import Block, split_columns

# A few tokens have activations that are larger by orders of magnitude, and would decide everything: one whose partial
# sums are this many times as large as the median's weighs less.
CLIP = 3.0
RIDGES = (1e-3, 1e-2, 1e-1)  # times the mean square of an input value
# Of a response. Behind layers that drop their sum, residuals are unlike those of the fit, so that a small ridge harms:
# with 22 of 30 sums dropped KL was 0.146, 0.141, 0.135, 0.130 for 0.03, 0.3, 1, 3, without a response 0.147, and with
# 15 dropped 0.062, 0.061, 0.061, 0.061 (SmolLM2-135M, TP=3, text unlike that of the fit).
RESPONSE_RIDGE = 3.0


@dataclass(frozen=True)
class SiteFit:
    """A regression in float32, and what it is worth, by windows that it has not seen.

    left: by rank, from 0 to k, the energy of what is left of the partial sums over their energy.
    weight: energy of the partial sums over that of the residual stream that they are added to, mean over tokens.
    Rounding hurts about in proportion to it.
    """

    regression: Regression
    left: list[float]
    weight: float

    def trace(self) -> dict:
        """What it leaves at ranks that it may be cut to, as JSON. With the bias these are multiples of eight rows."""
        k = len(self.regression.mean)
        ranks = [0, *range(7, k, 8), k]
        return {"weight": self.weight, "ranks": ranks, "left": [round(self.left[rank], 5) for rank in ranks]}


class Moments:
    """What a regression needs: sums over tokens of products of its inputs, a constant 1, and its outputs."""

    def __init__(self) -> None:
        self.gram: torch.Tensor | float = 0.0  # [hidden + 1, hidden + 1]
        self.cross: torch.Tensor | float = 0.0  # [hidden + 1, ranks * hidden]
        self.energy = 0.0
        self.relative, self.tokens = 0.0, 0

    def add(self, inputs: torch.Tensor, partials: torch.Tensor, residual: torch.Tensor) -> None:
        """inputs `[1, tokens, hidden]`; partials `[ranks, 1, tokens, hidden]`, and what these are added to."""
        y = partials[:, 0].transpose(0, 1).flatten(1).double()
        size = y.norm(dim=-1)
        weight = (CLIP * size.median() / size.clamp(min=1e-30)).clamp(max=1.0)[:, None] ** 2
        u = torch.cat([inputs[0].float(), inputs.new_ones(inputs.shape[1], 1)], 1).double()
        self.gram = self.gram + (u * weight).t() @ u
        self.cross = self.cross + (u * weight).t() @ y
        self.energy += float((y * y * weight).sum())
        stream = (residual + partials.sum(0))[0].float().norm(dim=-1)
        self.relative += float((size / stream.clamp(min=1e-30)).square().sum())
        self.tokens += len(y)

    def left(self, slope: torch.Tensor, bias: torch.Tensor) -> float:
        """Share of the energy that `u @ slope + bias` leaves."""
        whole = torch.cat([slope, bias[None]])
        explained = 2 * (whole * self.cross).sum() - (whole * (self.gram @ whole)).sum()
        return float(1 - explained / self.energy) if self.energy else 1.0

    def left_by_rank(self, regression: Regression) -> list[float]:
        """Share of the energy that the first 0, 1, ... columns of a regression leave."""
        down, mean, up, bias = (*regression[:2], regression.up.transpose(0, 1).flatten(1), regression.bias.flatten())
        if not self.energy:
            return [1.0] * (len(up) + 1)
        features = torch.nn.functional.pad(torch.cat([down, -mean[None]]), (1, 0))  # the bias' column comes first
        features[-1, 0] = 1.0
        rows = torch.cat([bias[None], up])
        met = 2 * (rows * (features.t() @ self.cross)).sum(1)
        squares = (rows @ rows.t()) * (features.t() @ self.gram @ features)
        explained = met.cumsum(0) - squares.cumsum(0).cumsum(1).diagonal()
        return (1 - explained / self.energy).tolist()


def partial_sums(block: Block, x: torch.Tensor, rope: tuple, ranks: int) -> Iterator[tuple[str, torch.Tensor, tuple]]:
    """Of one window x `[1, tokens, hidden]`: each site, its block's input there, and the ranks' partial sums."""
    attention = split_columns(block.heads(x, rope), block.modules_of.self_attn.o_proj.weight, ranks)
    yield "attention", x, attention
    h = x + attention.sum(0)
    yield "experts" if block.is_mixture else "mlp", h, block.mlp_sums(h.expand(ranks, *h.shape))


@torch.no_grad()
def fit_block(block: Block, x: torch.Tensor, rope: tuple, ranks: int, k: int, unseen: int) -> dict[str, SiteFit]:
    """Of both sites of a block, with its input x `[windows, context, hidden]`; the last `unseen` windows only check."""
    moments: dict[str, tuple[Moments, Moments]] = {}
    for number, window in enumerate(x):
        for site, its_input, partials in partial_sums(block, window[None], rope, ranks):
            of_site = moments.setdefault(site, (Moments(), Moments()))
            of_site[number >= len(x) - unseen].add(normalized(its_input), partials, its_input)
    return {site: fit(*each, ranks, k) for site, each in moments.items()}


@torch.no_grad()
def fit_response(
    block: Block, x: torch.Tensor, rope: tuple, predictor: Regression, k: int, unseen: int
) -> tuple[Response, float]:
    """Of a block's MLP to what attention's predictor leaves, where attention's sum is dropped.

    There the MLP makes the error sum_r (MLP_r(h) - MLP_r(h_r)): h has the whole sum of attention, h_r rank r's partial
    sum and the other ranks' predictions. It is regressed on sum_r E_r, the ranks' residuals. The map is the same for
    all ranks, so each can send the response to its own residual, which the others do not have. x as in `fit_block`.

    Returns it, and the share of that error's energy that it leaves on the unseen windows.
    """
    moments = Moments(), Moments()
    for number, window in enumerate(x):
        predicted = predictor.partial_sums(window := window[None])
        partial = split_columns(block.heads(window, rope), block.modules_of.self_attn.o_proj.weight, len(predicted))
        whole, rest = window + partial.sum(0), partial - predicted
        made = block.mlp_sums(window + predicted.sum(0) + rest).sum(0)
        moments[number >= len(x) - unseen].add(rest.sum(0), block.mlp_sums(whole[None]) - made, whole)
    found = fit(*moments, 1, k, ridges=(RESPONSE_RIDGE,))
    down, mean, up, bias, _ = found.regression
    return Response(down, up[0], bias[0] - mean @ up[0]), found.left[-1]


def fit(seen: Moments, unseen: Moments, ranks: int, k: int, ridges: Sequence[float] = RIDGES) -> SiteFit:
    """The regression of rank `k` that leaves the least of the seen tokens' partial sums, at the best of the ridges."""
    hidden = seen.gram.shape[0] - 1
    slope, bias, penalty = min(
        (_solve(seen, ridge) for ridge in ridges), key=lambda solved: unseen.left(solved[0], solved[1])
    )
    # Least squares of rank k: the leading directions of the full regression's predictions, about their mean.
    count, mean = seen.gram[-1, -1], seen.gram[-1, :-1] / seen.gram[-1, -1]
    root = torch.linalg.cholesky(seen.gram[:-1, :-1] + penalty - count * mean[:, None] * mean)
    predicted = root.t() @ slope
    _, directions = torch.linalg.eigh(predicted @ predicted.t())
    directions = directions[:, -k:].flip(1)
    # Of variance 1, so that float16 holds both factors, whatever the number of tokens.
    down = torch.linalg.solve_triangular(root.t(), directions, upper=True) * count.sqrt()
    mean, up, bias = mean @ down, directions.t() @ predicted / count.sqrt(), bias + mean @ slope
    up, bias = up.view(-1, ranks, hidden).transpose(0, 1), bias.view(ranks, hidden)
    found = Regression(down, mean, up.contiguous(), bias)
    return SiteFit(found.to(torch.float32), unseen.left_by_rank(found), unseen.relative / unseen.tokens)


def _solve(moments: Moments, ridge: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slope `[hidden, ranks * hidden]`, bias, and the penalty that a ridge adds to the inputs' products."""
    gram = moments.gram
    penalty = torch.diag(torch.full_like(gram.diagonal()[:-1], float(ridge * gram.diagonal()[:-1].mean())))
    whole = torch.linalg.solve(gram + torch.nn.functional.pad(penalty, (0, 1, 0, 1)), moments.cross)
    return whole[:-1], whole[-1], penalty
