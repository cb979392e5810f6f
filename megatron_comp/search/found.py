# SPDX-License-Identifier: Apache-2.0
"""What a search ends with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..policy import CompressionPolicy
from .bound import Bound


@dataclass(frozen=True)
class Found:
    """policy: to be written. point: what it measured. curves: by name, (cost, predicted KL) of the best trades.

    Of a search with drops also: distilled: blocks that have those weights; seconds: predicted, of a policy's sums.
    """

    policy: CompressionPolicy
    point: dict
    bound: Bound
    curves: Mapping[str, list[tuple[float, float]]] = field(default_factory=dict)
    distilled: Sequence[int] = ()
    seconds: Callable[[CompressionPolicy], float] | None = None
