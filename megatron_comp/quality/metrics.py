# SPDX-License-Identifier: Apache-2.0
"""How far a model's predictions are from a baseline's, computed where the vocabulary is split over the ranks."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from .bootstrap import ends, intervals

# The largest mean NLL, and the largest difference of two, whose exponential is taken: beyond it, infinity stands.
MAX_NLL = 700.0

QUANTILES = (0.5, 0.95, 0.99)  # of KL, over tokens


def perplexity(nll: float) -> float:
    """From a mean negative log-likelihood, in nats per token; infinite above `MAX_NLL`."""
    return math.inf if nll > MAX_NLL else math.exp(nll)


def increase_pct(nll: float, base_nll: float) -> float:
    """By how many percent perplexity exceeds that of `base_nll`; infinite if the two differ by more than `MAX_NLL`."""
    return math.inf if nll - base_nll > MAX_NLL else 100 * math.expm1(nll - base_nll)


@dataclass(slots=True)
class Prediction:
    """What a model said after each token: this rank's log-probabilities, and everybody's most likely next token."""

    log_probs: torch.Tensor
    """fp32 `[tokens, vocabulary of this rank]`."""
    best: torch.Tensor
    """`[tokens]`, the lowest of equals."""

    @classmethod
    def of(cls, logits: torch.Tensor, vocab_start: int, group) -> "Prediction":
        """From this rank's logits `[tokens, vocabulary of this rank]`, which begin at entry `vocab_start`."""
        logits = logits.float()
        highest, place = logits.max(dim=-1)
        everyone = torch.stack([highest.double(), (place + vocab_start).double()])
        gathered = [torch.empty_like(everyone) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, everyone, group=group)
        highest_of_all, ranks = torch.stack([theirs[0] for theirs in gathered]).max(dim=0)
        best = torch.stack([theirs[1] for theirs in gathered]).gather(0, ranks[None])[0].long()
        total = (logits - highest_of_all[:, None]).exp().sum(dim=-1)
        dist.all_reduce(total, group=group)
        return cls(logits - (highest_of_all + total.log())[:, None].float(), best)


@dataclass(slots=True)
class Quality:
    """A model's predictions beside a baseline's, token by token. Figures are means over all tokens.

    windows: what `add` was given, one after another: float64 `[4, tokens]`, of each token its negative log-likelihood,
    the KL divergence from the baseline, whether both say the same next token, and the change of the true one's
    probability.
    """

    windows: list[torch.Tensor] = field(default_factory=list)

    def add(self, said: Prediction, baseline: Prediction, targets: torch.Tensor, vocab_start: int, group) -> None:
        """Counts the predictions of `targets` `[tokens]`; KL is from the baseline to `said`. All ranks together."""
        local = targets - vocab_start
        mine = (local >= 0) & (local < said.log_probs.shape[1])
        place = local.clamp(0, said.log_probs.shape[1] - 1)[:, None]
        true, base_true = ((p.log_probs.gather(1, place)[:, 0] * mine).double() for p in (said, baseline))
        divergence = baseline.log_probs.exp() * (baseline.log_probs - said.log_probs)
        sums = torch.stack([true, base_true, divergence.sum(1, dtype=torch.float64)])
        dist.all_reduce(sums, group=group)
        true, base_true, divergence = sums
        agrees = (said.best == baseline.best).double()
        self.windows.append(torch.stack([-true, divergence, agrees, true.exp() - base_true.exp()]).cpu())

    @property
    def nll(self) -> float:
        return self._of_tokens(0).mean().item()

    @property
    def kl(self) -> float:
        return self._of_tokens(1).mean().item()

    @property
    def top1_agreement(self) -> float:
        return self._of_tokens(2).mean().item()

    def _of_tokens(self, place: int) -> torch.Tensor:
        return torch.cat([window[place] for window in self.windows])


def with_intervals(said: Quality, base: Quality) -> dict[str, float | None]:
    """A row's figures of a text, each with `_low` and `_high` of a 95 % interval:

    `perplexity`, `perplexity_increase_pct` over that of `base`, `kl` and its quantiles over tokens `kl_median`,
    `kl_p95` and `kl_p99`, `top1_agreement`, and `rms_probability_change` of the true token.

    Tokens of one window depend on each other, so windows are drawn, not tokens. Those of said and base are the same
    windows of the same length, and stay together. Raises ModuleNotFoundError without scipy.
    """
    ours, theirs = (np.stack([window.numpy() for window in quality.windows], axis=1) for quality in (said, base))
    nll, kl, agrees, change = ours
    of_windows = np.stack([nll, nll - theirs[0], kl, agrees, change**2]).mean(2)

    def statistic(chosen: np.ndarray) -> np.ndarray:
        quantiles = np.quantile(kl[chosen].reshape(len(chosen), -1), QUANTILES, axis=1)
        return np.concatenate([of_windows[:, chosen].mean(-1), quantiles])

    low, high = intervals(statistic, len(kl), 2 * kl.shape[1])
    measured, low, high = (
        _read(*figures.tolist()) for figures in (statistic(np.arange(len(kl))[None])[:, 0], low, high)
    )
    row = {}
    for name, value in measured.items():
        row |= {name: value, **ends(name, low[name], high[name])}
    return row


def _read(nll, nll_change, kl, agreement, square, kl_median, kl_p95, kl_p99) -> dict[str, float]:
    """Under their names, from means over tokens. All are monotone: an interval's ends become the ends of theirs."""
    return {
        "perplexity": perplexity(nll),
        "perplexity_increase_pct": increase_pct(nll_change, 0.0),
        "kl": kl,
        "kl_median": kl_median,
        "kl_p95": kl_p95,
        "kl_p99": kl_p99,
        "top1_agreement": agreement,
        "rms_probability_change": math.sqrt(square),
    }
