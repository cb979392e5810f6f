# SPDX-License-Identifier: Apache-2.0
"""Which ranks of a group are near one another, and the sub-groups that a hierarchical sum exchanges over.

An *island* is a set of ranks with fast links between them: a machine, or what a policy names. Every island deals the
rows of a tensor out in as many *shares* as its ranks have *places*, which are counted from 0 in rank order. In islands
of unequal size there are as many shares as the smallest has ranks, and ranks of later places own none.

    island 0    rank 0 (place 0)    rank 1 (place 1)
                     | across            | across
    island 1    rank 2 (place 0)    rank 3 (place 1)    rank 4 (place 2, no share)
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import final

import torch
import torch.distributed as dist

from .together import Together

Group = dist.ProcessGroup


@dataclass(frozen=True)
class Islands:
    """The ranks of a group by island: ascending in each, islands in the order of their first ranks."""

    members: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        """Raises ValueError if a rank is in no island, in two, or if an island is empty."""
        ranks = [rank for island in self.members for rank in island]
        if not ranks or sorted(ranks) != list(range(len(ranks))) or not all(self.members):
            given = [*map(list, self.members)]
            raise ValueError(f"islands {given} do not hold each of ranks 0 to {max(ranks, default=0)} once")
        ordered = tuple(sorted(tuple(sorted(island)) for island in self.members))
        object.__setattr__(self, "members", ordered)

    @classmethod
    def of_names(cls, names: Sequence[object]) -> "Islands":
        """Ranks with equal names share an island. names: of every rank's machine, in rank order."""
        return cls(tuple(tuple(r for r, its in enumerate(names) if its == name) for name in dict.fromkeys(names)))

    @classmethod
    def of_size(cls, ranks: int, size: int) -> "Islands":
        """Neighbouring ranks, so many to an island. Raises ValueError if that does not divide the ranks."""
        if size < 1 or ranks % size:
            raise ValueError(f"islands of {size} ranks do not divide {ranks} ranks")
        return cls(tuple(tuple(range(first, first + size)) for first in range(0, ranks, size)))

    def __str__(self) -> str:
        return str([*map(list, self.members)])

    @property
    def ranks(self) -> int:
        return sum(map(len, self.members))

    @property
    def shares(self) -> int:
        """Into how many parts the islands deal out the rows of a tensor."""
        return min(map(len, self.members))

    @property
    def are_equal(self) -> bool:
        return len(set(map(len, self.members))) == 1

    @property
    def have_two_levels(self) -> bool:
        """Whether there are several islands, and one of several ranks: else a hierarchical sum is the flat one."""
        return 1 < len(self.members) < self.ranks

    def find(self, rank: int) -> tuple[int, int]:
        """(island, place in it) of a rank."""
        return next((i, island.index(rank)) for i, island in enumerate(self.members) if rank in island)

    def across(self, place: int) -> tuple[int, ...]:
        """The ranks of one place in all islands, by island."""
        return tuple(island[place] for island in self.members)


@final
@dataclass(frozen=True, eq=False)
class Topology:
    """The islands of a group, and this rank's place among them; made once for a group, by `connect`."""

    islands: Islands
    island: int
    place: int
    inside: Group | None
    """The ranks of this island, by place."""
    across: Group | None
    """The ranks of this place, by island; None for a rank without a share."""

    @property
    def owns_share(self) -> bool:
        return self.place < self.islands.shares


def connect(islands: Mapping[Group | None, Islands]) -> dict[Group | None, Topology]:
    """The topologies of groups that this rank is in, their sub-groups made where they were not yet.

    Every rank of the job must call it at the same time, since torch.distributed makes groups on all ranks in one order;
    ranks may name different groups, or none. None names the group of all ranks. Sub-groups have backend and timeout of
    their group.

    Raises ValueError, on every rank if on one, for islands of another number of ranks than their group has, and for
    groups whose ranks do not ascend with those of the job.
    """
    with Together() as step:
        for group, its_islands in islands.items():
            _check(group, its_islands)
        wanted = [_sub_groups(group, its_islands) for group, its_islands in islands.items()]
        step.say(wanted)
    for members, backend, timeout in sorted(
        {one for subs in step.everyone.values() for sub in subs for one in sub}, key=str
    ):
        _made(dist.group.WORLD, members, backend, timeout)
    return {
        group: _topology(group, its_islands, subs)
        for (group, its_islands), subs in zip(islands.items(), wanted, strict=True)
    }


def _check(group: Group | None, islands: Islands) -> None:
    of_job = dist.get_process_group_ranks(group)
    if of_job != sorted(of_job):  # torch.distributed puts the ranks of new groups in this order
        raise ValueError(f"a hierarchical sum needs a group whose ranks ascend, not {of_job}")
    if islands.ranks != len(of_job):
        raise ValueError(f"islands {islands} are of {islands.ranks} ranks, the group is of {len(of_job)}")


def _sub_groups(group: Group | None, islands: Islands) -> tuple[tuple, ...]:
    """(ranks of the job, backend, seconds of timeout) of every sub-group of a group."""
    if not islands.have_two_levels:
        return ()
    of_job = dist.get_process_group_ranks(group)
    named = [*islands.members, *map(islands.across, range(islands.shares))]
    backend, timeout = dist.get_backend(group), _timeout(group)
    return tuple((tuple(of_job[rank] for rank in ranks), backend, timeout) for ranks in named)


def _topology(group: Group | None, islands: Islands, subs: tuple[tuple, ...]) -> Topology:
    island, place = islands.find(dist.get_rank(group))
    inside = across = None
    if subs:
        inside = _made(dist.group.WORLD, *subs[island])
        if place < islands.shares:
            across = _made(dist.group.WORLD, *subs[len(islands.members) + place])
    return Topology(islands, island, place, inside, across)


@cache
def _made(world: Group, ranks: tuple[int, ...], backend: str, timeout: float | None) -> Group:
    """One sub-group for all that name it. world: tells jobs apart that follow one another in one process."""
    return dist.new_group([*ranks], None if timeout is None else timedelta(seconds=timeout), backend)


def _timeout(group: Group | None) -> float | None:
    """Seconds after which the group gives up; None where its backend does not say."""
    device = torch.device("cpu" if dist.get_backend(group) == "gloo" else "cuda")
    with suppress(AttributeError, RuntimeError):
        return (group or dist.group.WORLD)._get_backend(device).options._timeout.total_seconds()
    return None
