# SPDX-License-Identifier: Apache-2.0
"""What a search ends with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..policy import CompressionPolicy
from .bound import Bound
from .words import Words


@dataclass(frozen=True)
class Found:
    """policy: to be written. point: what it measured. curves: by name, (cost, predicted KL) of the best trades.

    Of a search with drops also: distilled: blocks that have those weights; words: what tells the time of a policy.
    """

    policy: CompressionPolicy
    point: dict
    bound: Bound
    curves: Mapping[str, list[tuple[float, float]]] = field(default_factory=dict)
    distilled: Sequence[int] = ()
    words: Words | None = None
