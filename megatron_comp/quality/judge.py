# SPDX-License-Identifier: Apache-2.0
"""What a policy does to the predictions of a model on a text, beside the same model uncompressed."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..files import digest
from ..inference import stages
from ..inference.generate import logits, vocab_start
from ..inference.weight_overrides import WeightOverrides
from ..launcher.progress import progress
from ..layers.apply import apply_compression, remove_compression, stats
from ..layers.meter import ModelStats, wait_for_device
from ..policy import CompressionPolicy
from .journal import Journal
from .metrics import Prediction, Quality

POINTS = "points"  # the part of a journal that points are in


@dataclass(frozen=True)
class Trial:
    """What is judged: the model under a policy, with the overrides' weights in some blocks. name: for progress bars."""

    name: str
    policy: CompressionPolicy = CompressionPolicy()
    blocks: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """Names the trial's point among those of the same model, text and overrides."""
        return str(self.policy)

    def apply(self, model: torch.nn.Module) -> None:
        """Changes how the model sums; `remove_compression` takes it back."""
        apply_compression(model, self.policy)


@dataclass(slots=True)
class Judgement:
    """One trial's way through the text: scored tokens, what its reductions sent, seconds of its forwards.

    Of a pipeline: the reductions of all stages, and the bytes that the rank received that received most.
    """

    quality: Quality = field(default_factory=Quality)
    traffic: ModelStats = field(default_factory=lambda: ModelStats([]))
    received_bytes: int = 0
    seconds: float = 0.0

    @property
    def nll(self) -> float:
        """Nats per token; so is `kl`, the divergence from the uncompressed model."""
        return self.quality.nll

    @property
    def kl(self) -> float:
        return self.quality.kl

    @property
    def top1_agreement(self) -> float:
        return self.quality.top1_agreement


class _Forward(NamedTuple):
    """One forward of a window: what the last pipeline stage said, what this rank's reductions sent, and seconds."""

    said: Prediction | None
    traffic: ModelStats
    seconds: float


class Judge:
    """Scores a model's predictions of all but the first token of each window.

    windows: int64 `[windows, context]`. overrides: the weights that trials may name blocks of.

    keep: whether the uncompressed model's predictions stay in memory for further trials: on each rank 4 bytes per token
    and entry of its part of the vocabulary. Otherwise each call of `judge` makes them anew, window by window.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        windows: torch.Tensor,
        journal: Journal | None = None,
        overrides: WeightOverrides | None = None,
        keep: bool = True,
    ) -> None:
        self.model, self.windows, self.journal, self.overrides = model, windows, journal, overrides
        self.keep = keep
        self._kept: dict[int, _Forward] = {}
        self._vocab_start, self._group = vocab_start(model), model.tp_group

    @property
    def tokens(self) -> int:
        """That are scored."""
        return len(self.windows) * (self.windows.shape[1] - 1)

    @property
    def points(self) -> list[dict]:
        """All that the journal holds, of earlier runs too: what `point` returned."""
        return list(self.journal[POINTS].values())

    def judge(self, trials: Sequence[Trial], title: str) -> list[Judgement]:
        """Of the uncompressed model with its own weights, then of each trial. All ranks call this together.

        Window by window all trials run in turn, so that a slow minute hits all alike. title: of the progress bar.
        """
        base, judged = Judgement(), [Judgement() for _ in trials]
        steps = len(self.windows) * len(trials)
        bar = progress(total=steps, desc=title, unit="forward")
        try:
            for number, window in enumerate(self.windows):
                reference = self._reference(number)
                self._add(base, reference, reference, window)
                for trial, judgement in zip(trials, judged, strict=True):
                    self._add(judgement, self._run(trial, window), reference, window)
                    bar.update()
        finally:
            bar.close()
            remove_compression(self.model)
            if self.overrides:
                self.overrides.use()
        for each in (base, *judged):
            each.quality = stages.from_last(self.model, each.quality)
            each.traffic, each.received_bytes = stages.stats_of_all(self.model, each.traffic, self.windows.numel())
        return [base, *judged]

    def point(self, trial: Trial, **labels: object) -> dict:
        """What a trial measures, in a journal at most once: `nll` and `base_nll`, `kl`, `top1_agreement`,
        `bits_per_value` and `received_bytes` of this rank; behind the trial's name and the given labels."""
        key = self._key(trial)
        if key not in self.journal[POINTS]:
            base, judged = self.judge([trial], trial.name)
            measured = {
                "bits_per_value": judged.traffic.bits_per_value,
                "kl": judged.kl,
                "nll": judged.nll,
                "base_nll": base.nll,
                "top1_agreement": judged.top1_agreement,
                "received_bytes": judged.received_bytes,
            }
            # A label may replace what cannot be measured.
            self.journal.keep(POINTS, {key: {"name": trial.name, **measured, **labels}})
        return self.journal[POINTS][key]

    def _key(self, trial: Trial) -> str:
        """With weights, also what is in their file."""
        if not trial.blocks:
            return trial.key
        return f"{trial.key} {digest(self.overrides.path)} {sorted(trial.blocks)}"

    def _reference(self, number: int) -> _Forward:
        if number in self._kept:
            return self._kept[number]
        made = self._run(Trial("uncompressed"), self.windows[number])
        if self.keep:
            self._kept[number] = made
        return made

    def _run(self, trial: Trial, window: torch.Tensor) -> _Forward:
        if self.overrides:
            self.overrides.use(trial.blocks)
        trial.apply(self.model)
        wait_for_device()
        start = time.perf_counter()
        out = logits(self.model, window[None])
        wait_for_device()
        seconds = time.perf_counter() - start
        said = None if out is None else Prediction.of(out[0, :-1], self._vocab_start, self._group)
        return _Forward(said, stats(self.model), seconds)

    def _add(self, judgement: Judgement, made: _Forward, reference: _Forward, window: torch.Tensor) -> None:
        if made.said is not None:
            targets = window[1:].to(made.said.best.device)
            judgement.quality.add(made.said, reference.said, targets, self._vocab_start, self._group)
        judgement.traffic.sites += made.traffic.sites
        judgement.seconds += made.seconds
