# SPDX-License-Identifier: Apache-2.0
"""What each shape of sum does under one policy, decided once for all sites of a model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..policy import DROP, CompressionPolicy
from ..wire import exchange
from ..wire.calibration import Calibration
from ..wire.codec import one_codec
from ..wire.cost import choose_algorithm, choose_chunks, choose_parts, choose_scatter
from ..wire.plan import SumPlan, plan_all_reduce, plan_reduce_scatter
from ..wire.topology import Topology
from ..wire.traffic import ring_bytes

Group = torch.distributed.ProcessGroup

# Choices that are kept. A prompt's length makes one for each codec that the policy names, and so does every batch size
# of decoded tokens.
KNOWN_CHOICES = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """What one sum does. `plan` None: the stock collective, and `reason` says why.

    values, message_bytes, received_bytes: what it counts for, see `Traffic`.
    """

    plan: SumPlan | None
    in_parts: SumPlan | None
    """The same sum where its rows are computed part by part, a chunk for each part; None where it goes in one piece."""
    reason: str
    values: int
    message_bytes: int
    received_bytes: int
    algorithm: str | None = None
    """That sums, or None where the stock collective does."""


class Plans:
    """The choices of one policy, with what was measured of one group. Shared by all sites that sum over that group."""

    def __init__(self, policy: CompressionPolicy, calibration: Calibration, topology: Topology | None = None) -> None:
        self.policy, self.calibration, self.topology = policy, calibration, topology
        self._islands = topology and topology.islands
        self._known: dict[tuple, Choice] = {}

    def get(
        self,
        word: str,
        shape: torch.Size,
        like: torch.Tensor,
        group: Group,
        scatter: bool = False,
        splits: Sequence[int] | None = None,
    ) -> Choice:
        """For a sum of `shape` in a place of which the policy says `word`: a codec's name, `none`, or `drop`.

        like: of the sum's type and device; its values are not read. scatter: a reduce-scatter instead of an all-reduce.
        splits: rows of each rank's slice; without it they are equal.
        """
        splits = None if splits is None else tuple(splits)
        key = (word, shape, like.dtype, group, scatter, splits)
        return self._known.get(key) or self._add(key, self._choose(word, shape, like, group, scatter, splits))

    def _add(self, key: tuple, choice: Choice) -> Choice:
        if len(self._known) >= KNOWN_CHOICES:
            self._known.clear()
        self._known[key] = choice
        return choice

    def _choose(
        self,
        word: str,
        shape: torch.Size,
        like: torch.Tensor,
        group: Group,
        scatter: bool,
        splits: tuple[int, ...] | None,
    ) -> Choice:
        ranks, itemsize, device, islands = group.size(), like.element_size(), like.device, self._islands
        decision = self.policy.decide_message(word, shape, itemsize, ranks, self.calibration, scatter, islands)
        if decision.reason == DROP:
            return Choice(None, None, DROP, 0, 0, 0)
        if decision.codec is None:
            nbytes = shape.numel() * itemsize
            ring = ring_bytes(nbytes, ranks, passes=1 if scatter else 2)
            return Choice(None, None, decision.reason, shape.numel(), nbytes, ring)
        of_bytes = exchange.chunk_bytes(device.type) or self.calibration.chunk_bytes
        if scatter:
            one = shape, one_codec(decision.codec, "reduce_scatter"), ranks
            way = choose_scatter(*one, decision.algorithm, self.calibration, islands)
            topology = self.topology if way == "hierarchical_scatter" else None
            plan = plan_reduce_scatter(*one, group.rank(), splits, of_bytes, topology, itemsize)
            return Choice(plan, None, "", plan.values, plan.message_bytes, plan.received_bytes, plan.algorithm)
        how = shape, decision.codec, ranks
        algorithm = choose_algorithm(*how, decision.algorithm, self.calibration, islands)
        chunks = choose_chunks(*how, algorithm, self.calibration, of_bytes, islands)
        parts = choose_parts(*how, algorithm, self.calibration, device, islands)
        shared = *how, group.rank(), algorithm
        plan = plan_all_reduce(*shared, chunks, topology=self.topology, itemsize=itemsize)
        in_parts = None
        if parts > 1:
            in_parts = plan_all_reduce(*shared, parts, topology=self.topology, itemsize=itemsize)
        if in_parts is not None and len(in_parts.chunks) == 1:
            in_parts = None
        return Choice(plan, in_parts, "", plan.values, plan.message_bytes, plan.received_bytes, plan.algorithm)
