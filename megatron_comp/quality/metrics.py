# SPDX-License-Identifier: Apache-2.0
"""How far a model's predictions are from a baseline's, computed where the vocabulary is split over the ranks."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

# The largest mean NLL, and the largest difference of two, whose exponential is taken: beyond it, infinity stands.
MAX_NLL = 700.0


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
    """Sums over scored tokens."""

    nll: float = 0.0
    kl: float = 0.0
    agreements: int = 0
    tokens: int = 0

    def add(self, said: Prediction, baseline: Prediction, targets: torch.Tensor, vocab_start: int, group) -> None:
        """Counts the predictions of `targets` `[tokens]`; KL is from the baseline to `said`, in nats."""
        local = targets - vocab_start
        mine = (local >= 0) & (local < said.log_probs.shape[1])
        picked = said.log_probs.gather(1, local.clamp(0, said.log_probs.shape[1] - 1)[:, None])[:, 0]
        divergence = (baseline.log_probs.exp() * (baseline.log_probs - said.log_probs)).double().sum()
        sums = torch.stack([-(picked * mine).double().sum(), divergence])
        dist.all_reduce(sums, group=group)
        self.nll += sums[0].item()
        self.kl += sums[1].item()
        self.agreements += int((said.best == baseline.best).sum())
        self.tokens += len(targets)
