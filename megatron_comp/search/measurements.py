"""What a policy does to a model on the calibration text, with real compressed sums over the real ranks."""

from collections.abc import Callable, Collection
from contextlib import contextmanager

import torch
import torch.distributed as dist
from tqdm import tqdm

from ..inference.weight_overrides import WeightOverrides
from ..launcher import output
from ..layers.apply import apply_compression, remove_compression, stats
from ..policy import CompressionPolicy
from ..quality.comparison import Comparison
from ..quality.judge import key_of
from .sensitivity import attach_probes, measure_window
from .state import State


class Calibration:
    """A model, a text, and what was measured of them. windows: int64 `[windows, context]`.

    overrides: distilled weights of blocks that do without attention's sum, if there are any.
    """

    def __init__(
        self, model: torch.nn.Module, windows: torch.Tensor, state: State, overrides: WeightOverrides | None = None
    ) -> None:
        self.model, self.windows, self.state, self.overrides = model, windows, state, overrides
        self._comparison = Comparison(model, windows)
        self._base_nll: float | None = None

    @property
    def tokens(self) -> int:
        """That are scored: all but the first of each window."""
        return self._comparison.tokens

    def sensitivity(self, candidates: tuple, joined: bool = False) -> list[dict]:
        """A row for each place: `layer`, `site`, `values` of a sum, `nbytes[candidate]`, `damage[step][candidate]`;
        with `joined`, for an MLP also what that is in a block that drops attention's sum."""
        seen = self.state.seen["sensitivity"] or {"windows": 0, "rows": []}
        done = seen["windows"]
        if done == len(self.windows):
            return seen["rows"]
        bar = tqdm(total=len(self.windows), initial=done, desc="sensitivity", unit="window", disable=_silent())
        probes = attach_probes(self.model, candidates, joined)
        for probe, row in zip(probes, seen["rows"]):
            probe.go_on(row)
        for number in range(done, len(self.windows)):
            measure_window(self.model, self.windows[number], number)
            seen = _of_first_rank({"windows": number + 1, "rows": [probe.row() for probe in probes]})
            self.state.seen["sensitivity"] = seen
            self.state.save()
            bar.update()
        bar.close()
        remove_compression(self.model)
        return seen["rows"]

    def point(
        self,
        name: str,
        kind: str,
        policy: CompressionPolicy,
        predicted_kl: float | None = None,
        distilled: Collection[int] = (),
    ) -> dict:
        """What `policy` does, measured at most once. name, kind and predicted_kl: for tables and figures.

        distilled: blocks that have the weights of `overrides`.
        """
        said = {"name": name, "kind": kind, "algorithm": policy.algorithm, "predicted_kl": predicted_kl}
        said |= {"policy": str(policy), "distilled": sorted(distilled)}
        key = key_of(policy, self.overrides.path if distilled else None, distilled)
        return self._measured(key, said, lambda: self._applied(policy, distilled))

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
            self._comparison.measure_full()
            if self._base_nll is None:
                self._base_nll = self._comparison.full_nll()
            with compressed() as bits_per_value:
                quality = self._comparison.quality(said["name"])
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

    @contextmanager
    def _applied(self, policy: CompressionPolicy, distilled: Collection[int]):
        if distilled:
            self.overrides.use(distilled)
        apply_compression(self.model, policy)
        yield lambda: stats(self.model).bits_per_value
        remove_compression(self.model)
        if distilled:
            self.overrides.use()


def _of_first_rank(measured: dict) -> dict:
    """Ranks that differed by a rounding would go different ways."""
    everybodys = [measured]
    dist.broadcast_object_list(everybodys, 0)
    return everybodys[0]


def _silent() -> bool:
    return not output.is_first_rank()
