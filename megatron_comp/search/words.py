# SPDX-License-Identifier: Apache-2.0
"""What a sum may be in a search for the least time, and how long that takes on a link."""

from dataclasses import dataclass, field

from ..policy import CompressionPolicy
from ..predict.times import Job, sums
from ..wire.calibration import Calibration
from ..wire.codec import Codec, parse_codec
from ..wire.cost import stock_seconds, sum_seconds
from .candidates import joined_name
from .solve import Choice, undominated

NS = 1e9  # costs are whole nanoseconds


@dataclass(frozen=True)
class Words:
    """What one sum may be, `none` included, and what each word costs on a link. algorithm: of the codecs.

    Candidates whose time the calibration does not know are no words: nobody knows what they would gain.
    """

    candidates: tuple[Codec, ...]
    algorithm: str
    job: Job
    calibration: Calibration
    _costs: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    def choices(self, damages: list[list[float]], tokens: int) -> list[Choice]:
        """damages: `[step][candidate]` of all tokens. The best trades, `none` always among them."""
        stock = stock_seconds(self.job.shape[0] * self.job.shape[1] * self.job.itemsize, self.job.tp, self.calibration)
        found = [Choice("none", round(NS * stock), 0.0)]
        for first, second, damage in self._pairs(damages):
            name = joined_name(str(first), str(second))
            found.append(Choice(name, self._cost(name), damage / tokens))
        return undominated(found)

    def _cost(self, name: str) -> int:
        """All sums of a model are of one shape."""
        if name not in self._costs:
            seconds = sum_seconds(self.job.shape, parse_codec(name), self.job.tp, self.algorithm, self.calibration)
            self._costs[name] = round(NS * seconds)
        return self._costs[name]

    def _pairs(self, damages: list[list[float]]):
        """(codec of the first phase, of the second, damage); `gather_sum` has one phase."""
        rounded = [row for row in zip(self.candidates, *damages, strict=True) if self.calibration.knows(row[0])]
        for first, damage, _ in rounded:
            if self.algorithm == "gather_sum":
                yield first, first, damage
            else:
                yield from ((first, second, damage + more) for second, _, more in rounded)

    def untimed(self, policy: CompressionPolicy) -> list[str]:
        """Codecs of the policy whose time the calibration does not know."""
        return [str(codec) for codec in policy.codecs() if not self.calibration.knows(codec)]

    def seconds(self, policy: CompressionPolicy) -> float | None:
        """Of all sums of a prefill, every message compressed that the policy compresses; None if some of its codecs are
        untimed."""
        return None if self.untimed(policy) else sums(self.job, policy, self.calibration).seconds
