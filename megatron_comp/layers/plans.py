"""What each shape of sum does under one policy, decided once for all sites of a model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..policy import CompressionPolicy
from ..wire import exchange
from ..wire.cost import choose_algorithm, choose_chunks, choose_parts, choose_scatter, ring_bytes
from ..wire.figures import Figures
from ..wire.plan import SumPlan, plan_all_reduce, plan_reduce_scatter
from ..wire.topology import Topology

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


class Plans:
    """The choices of one policy, with what was measured of one group. Shared by all sites that sum over that group."""

    def __init__(self, policy: CompressionPolicy, figures: Figures, topology: Topology | None = None) -> None:
        self.policy, self.figures, self.topology = policy, figures, topology
        self._islands = topology and topology.islands
        self._known: dict[tuple, Choice] = {}

    def all_reduce(self, word: str, partial: torch.Tensor, group: Group) -> Choice:
        """For a place of which the policy says `word`: a codec's name, `none`, or `drop`."""
        key = (word, partial.shape, partial.dtype, group)
        return self._known.get(key) or self._add(key, self._choose_all_reduce(word, partial, group))

    def reduce_scatter(
        self, word: str, partial: torch.Tensor, group: Group, splits: Sequence[int] | None = None
    ) -> Choice:
        """The same of a reduce-scatter; splits: rows of each rank's slice, without it they are equal."""
        splits = None if splits is None else tuple(splits)
        key = (word, partial.shape, partial.dtype, group, "scatter", splits)
        return self._known.get(key) or self._add(key, self._choose_reduce_scatter(word, partial, group, splits))

    def _add(self, key: tuple, choice: Choice) -> Choice:
        if len(self._known) >= KNOWN_CHOICES:
            self._known.clear()
        self._known[key] = choice
        return choice

    def _choose_all_reduce(self, word: str, partial: torch.Tensor, group: Group) -> Choice:
        shape, ranks, figures = partial.shape, group.size(), self.figures
        decision = self.policy.decide_message(word, shape, partial.element_size(), ranks, figures, False, self._islands)
        if decision.codec is None:
            return _stock(decision.reason, partial, ranks, passes=2)
        algorithm = choose_algorithm(shape, decision.codec, ranks, decision.algorithm, figures, self._islands)
        how = shape, decision.codec, ranks, algorithm, figures
        device = partial.device.type
        of_bytes = exchange.chunk_bytes(device) or figures.chunk_bytes
        parts = choose_parts(*how, partial.device, self._islands)
        shared = shape, decision.codec, ranks, group.rank(), algorithm
        raw = {"topology": self.topology, "itemsize": partial.element_size()}
        plan = plan_all_reduce(*shared, choose_chunks(*how, of_bytes, self._islands), **raw)
        in_parts = plan_all_reduce(*shared, parts, **raw) if parts > 1 else None
        if in_parts is not None and len(in_parts.chunks) == 1:
            in_parts = None
        return Choice(plan, in_parts, "", plan.values, plan.message_bytes, plan.received_bytes)

    def _choose_reduce_scatter(
        self, word: str, partial: torch.Tensor, group: Group, splits: tuple[int, ...] | None
    ) -> Choice:
        shape, ranks = partial.shape, group.size()
        size = partial.element_size()
        decision = self.policy.decide_message(word, shape, size, ranks, self.figures, True, self._islands)
        if decision.codec is None:
            return _stock(decision.reason, partial, ranks, passes=1)
        of_bytes = exchange.chunk_bytes(partial.device.type) or self.figures.chunk_bytes
        way = choose_scatter(shape, decision.codec, ranks, decision.algorithm, self.figures, self._islands)
        shared = shape, decision.codec, ranks, group.rank(), splits, of_bytes
        topology = self.topology if way == "hierarchical_scatter" else None
        plan = plan_reduce_scatter(*shared, topology, size)
        return Choice(plan, None, "", plan.values, plan.message_bytes, plan.received_bytes)


def _stock(reason: str, partial: torch.Tensor, ranks: int, passes: int) -> Choice:
    nbytes = partial.numel() * partial.element_size()
    return Choice(None, None, reason, partial.numel(), nbytes, ring_bytes(nbytes, ranks, passes))
