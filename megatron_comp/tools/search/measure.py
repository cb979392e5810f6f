"""What a policy does to a model on the calibration text, with real compressed sums over the real ranks."""

from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.distributed as dist
from tqdm import tqdm

from ...inference.generate import logits
from ...layers.apply import apply_compression, remove_compression, stats
from ...policy import CompressionPolicy
from .. import output
from ..metrics import Prediction, Quality
from .sensitivity import attach_probes, measure_window
from .state import State


class Calibration:
    """A model, a text, and what was measured of them. windows: int64 `[windows, context]`.

    Each rank keeps its part of the uncompressed model's log-probabilities, 4 bytes for each scored token and entry of
    its part of the vocabulary.
    """

    def __init__(self, model: torch.nn.Module, windows: torch.Tensor, state: State) -> None:
        self.model, self.windows, self.state = model, windows, state
        embedding = model.embedding.word_embeddings
        self._vocab_start, self._group = embedding.vocab_start_index, embedding.tp_group
        self._baseline: list[Prediction] = []

    @property
    def tokens(self) -> int:
        """That are scored: all but the first of each window."""
        return len(self.windows) * (self.windows.shape[1] - 1)

    def sensitivity(self, candidates: tuple) -> list[dict]:
        """A row for each place: `layer`, `site`, `values` of a sum, `nbytes[candidate]`, `damage[step][candidate]`."""
        seen = self.state.seen["sensitivity"] or {"windows": 0, "rows": []}
        done = seen["windows"]
        if done == len(self.windows):
            return seen["rows"]
        bar = tqdm(total=len(self.windows), initial=done, desc="sensitivity", unit="window", disable=_silent())
        probes = attach_probes(self.model, candidates)
        for probe, row in zip(probes, seen["rows"]):
            probe.damage += torch.tensor(row["damage"], dtype=torch.float64)
        for number in range(done, len(self.windows)):
            measure_window(self.model, self.windows[number], number)
            rows = [
                {"layer": p.layer, "site": p.site, "values": p.values, "nbytes": p.nbytes, "damage": p.damage.tolist()}
                for p in probes
            ]
            self.state.seen["sensitivity"] = seen = _of_first_rank({"windows": number + 1, "rows": rows})
            self.state.save()
            bar.update()
        bar.close()
        remove_compression(self.model)
        return seen["rows"]

    def point(self, name: str, kind: str, policy: CompressionPolicy, predicted_kl: float | None = None) -> dict:
        """What `policy` does, measured at most once. name, kind and predicted_kl: for tables and figures."""
        said = {"name": name, "kind": kind, "algorithm": policy.algorithm, "predicted_kl": predicted_kl}
        return self._measured(str(policy), said, lambda: _applied(self.model, policy))

    def simulated(self, name: str, bits_per_value: float, rounded: Callable) -> dict:
        """The same of something that is no codec: `rounded(model)` is a context in which the model rounds its sums."""

        @contextmanager
        def compressed():
            with rounded(self.model):
                yield lambda: bits_per_value

        said = {"name": name, "kind": "baseline", "algorithm": "all_reduce", "predicted_kl": None}
        return self._measured(name, said, compressed)

    def _measured(self, key: str, said: dict, compressed: Callable) -> dict:
        points = self.state.seen["points"]
        if key not in points:
            self._measure_baseline()
            with compressed() as bits_per_value:
                quality = Quality()
                for window, baseline in zip(
                    tqdm(self.windows, said["name"], disable=_silent()), self._baseline, strict=True
                ):
                    predicted = self._predict(window)
                    targets = window[1:].to(predicted.best.device)
                    quality.add(predicted, baseline, targets, self._vocab_start, self._group)
                bits = bits_per_value()
            points[key] = _of_first_rank(
                {
                    **said,
                    "bits_per_value": bits,
                    "kl": quality.kl / quality.tokens,
                    "nll": quality.nll / quality.tokens,
                    "base_nll": self._base_nll,
                    "top1_agreement": quality.agreements / quality.tokens,
                }
            )
            self.state.save()
        return points[key]

    def _measure_baseline(self) -> None:
        if self._baseline:
            return
        remove_compression(self.model)
        quality = Quality()
        for window in tqdm(self.windows, "uncompressed", disable=_silent()):
            said = self._predict(window)
            self._baseline.append(said)
            quality.add(said, said, window[1:].to(said.best.device), self._vocab_start, self._group)
        self._base_nll = quality.nll / quality.tokens

    def _predict(self, window: torch.Tensor) -> Prediction:
        return Prediction.of(logits(self.model, window[None])[0, :-1], self._vocab_start, self._group)


@contextmanager
def _applied(model: torch.nn.Module, policy: CompressionPolicy):
    apply_compression(model, policy)
    yield lambda: stats(model).bits_per_value
    remove_compression(model)


def _of_first_rank(measured: dict) -> dict:
    """Ranks that differed by a rounding would go different ways."""
    everybodys = [measured]
    dist.broadcast_object_list(everybodys, 0)
    return everybodys[0]


def _silent() -> bool:
    return not output.is_first_rank()
