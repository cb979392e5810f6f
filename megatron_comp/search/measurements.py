# SPDX-License-Identifier: Apache-2.0
"""What a search measures of a model on its text, each thing once: sensitivities, and policies on the real ranks."""

from collections.abc import Collection
from dataclasses import replace

from ..launcher.progress import progress
from ..layers.apply import remove_compression
from ..policy import CompressionPolicy
from ..quality.judge import Judge, Trial
from .sensitivity import attach_probes, measure_window

SENSITIVITY = "sensitivity"


class Measurements:
    """Of the judge's model and text, kept in its journal.

    predictor: a file that all policies use, and with which sensitivities are measured.
    """

    def __init__(self, judge: Judge, predictor: str | None = None) -> None:
        self.judge, self.predictor = judge, predictor

    def sensitivity(self, candidates: tuple, joined: bool = False) -> list[dict]:
        """A row for each place: `layer`, `site`, `values` of a sum, `nbytes[candidate]`, `damage[step][candidate]`;
        with `joined`, for an MLP also what that is in a block that drops attention's sum."""
        model, windows, journal = self.judge.model, self.judge.windows, self.judge.journal
        seen = journal[SENSITIVITY] or {"windows": 0, "rows": []}
        done = seen["windows"]
        if done == len(windows):
            return seen["rows"]
        probes = attach_probes(model, candidates, joined, self.predictor)
        for probe, row in zip(probes, seen["rows"]):
            probe.go_on(row)
        for number in progress(range(done, len(windows)), "sensitivity", len(windows), initial=done):
            measure_window(model, windows[number], number)
            seen = journal.keep(SENSITIVITY, {"windows": number + 1, "rows": [probe.row() for probe in probes]})
        remove_compression(model)
        return seen["rows"]

    def point(
        self,
        name: str,
        kind: str,
        policy: CompressionPolicy,
        predicted_kl: float | None = None,
        distilled: Collection[int] = (),
    ) -> dict:
        """What `policy` does, as `Judge.point` has it. name, kind and predicted_kl: for tables and figures.

        distilled: blocks that have the weights of the judge's overrides.
        """
        trial = Trial(name, replace(policy, predictor=self.predictor), tuple(sorted(distilled)))
        return self.judge.point(trial, **labels(trial, kind, predicted_kl))


def labels(trial: Trial, kind: str, predicted_kl: float | None = None) -> dict[str, object]:
    """What a search's table and figure tell of a point, besides what it measured."""
    return {
        "kind": kind,
        "algorithm": trial.policy.algorithm,
        "predicted_kl": predicted_kl,
        "policy": str(trial.policy),
        "distilled": list(trial.blocks),
    }
