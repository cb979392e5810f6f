# SPDX-License-Identifier: Apache-2.0
"""Which KL is harmless: over all settings, KL on texts beside answers that flip."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .paired import together

FLIPS = (0.01, 0.02, 0.05, 0.1)  # shares that a bound on KL is given for


@dataclass(frozen=True)
class Fit:
    """flips = scale * KL ** exponent, by least squares of logarithms, over so many `points`. Each is weighted by its
    number of flips: the variance of that number's logarithm is its inverse.

    exponent_error: standard error, by how far the points are from the line.

    If a setting moves log-probabilities by a noise of size s, KL grows as s squared, and flips, which need a lead
    smaller than about s, grow as s: an exponent of 0.5 is expected while both are small.
    """

    scale: float
    exponent: float
    exponent_error: float
    points: int

    def flips(self, kl: float) -> float:
        return self.scale * kl**self.exponent

    def kl(self, flips: float) -> float:
        return (flips / self.scale) ** (1 / self.exponent)


def relate(texts: Mapping[str, list[dict]], tasks: list[dict], score: str = "acc") -> list[dict]:
    """A row for each setting that is in every text and in the tasks, by KL from the least:

    `setting`, `bits_per_value`, `kl` and `perplexity_increase_pct` (means over the texts), and of `compare`, of all
    tasks together, `items`, `flips`, `accuracy_change` and `margin_change` with their ends, `to_wrong`, `to_right`,
    `mcnemar_p`.

    texts: rows of `megatron-comp evaluate`, by text. tasks: rows of `paired.compare`. score: `acc` or `acc_norm`.
    """
    compared = {row["setting"]: row for row in together(tasks, score)}
    by_setting = [{row["codec"]: row for row in rows} for rows in texts.values()]
    rows = []
    for setting, task in compared.items():
        of_texts = [text[setting] for text in by_setting if setting in text]
        if by_setting and len(of_texts) == len(by_setting):
            kl, increase = (_mean([row[key] for row in of_texts]) for key in ("kl", "perplexity_increase_pct"))
            of_texts = {"bits_per_value": of_texts[0]["bits_per_value"], "kl": kl, "perplexity_increase_pct": increase}
            rows.append({"setting": setting, **of_texts, **{k: task[k] for k in task if k not in ("setting", "task")}})
    return sorted((row for row in rows if row["kl"] is not None), key=lambda row: row["kl"])


def next_tokens(texts: Mapping[str, list[dict]]) -> list[dict]:
    """The same of next tokens, which need no tasks: `setting`, `kl`, and as `flips` the share of tokens of all texts
    whose most likely next token is another one than without compression. All settings have the same `items`."""
    rows = [row for rows in texts.values() for row in rows if row["kl"] is not None]
    return [{"setting": row["codec"], "kl": row["kl"], "flips": 1 - row["top1_agreement"], "items": 1} for row in rows]


def fit(rows: list[dict]) -> Fit | None:
    """Of rows with `kl`, `flips` and `items`. None of fewer than three with flips: a line through two is no finding."""
    rows = [row for row in rows if row["kl"] > 0 and row["flips"] > 0]
    if len({row["kl"] for row in rows}) < 3:
        return None
    kl, flips, items = (np.array([row[key] for row in rows], dtype=float) for key in ("kl", "flips", "items"))
    (exponent, scale), covariance = np.polyfit(np.log(kl), np.log(flips), 1, w=np.sqrt(flips * items), cov=True)
    if exponent <= 0:
        return None
    return Fit(math.exp(scale), float(exponent), math.sqrt(covariance[0, 0]), len(rows))


def _mean(values: list[float | None]) -> float | None:
    """None where one of them is not finite, as JSON has it."""
    return None if None in values else sum(values) / len(values)
