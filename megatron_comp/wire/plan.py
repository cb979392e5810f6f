# SPDX-License-Identifier: Apache-2.0
"""What one sum over ranks does: all that follows from shape, codec, algorithm and group, worked out once.

A plan is immutable and shared. Two sums of one shape over one group follow the same plan, in whatever layer they stand.
"""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

from . import exchange
from .codec import Codec, CodecPair
from .cost import choose_algorithm, most_chunks
from .topology import Topology
from .traffic import (
    flat_across,
    received_by_level,
    received_by_level_scatter,
    received_bytes,
    received_bytes_scatter,
    scatter_rows,
    slice_rows,
    step_codecs,
)

# Plans that are kept: a prompt's length makes one for each codec and phase that a policy names.
KNOWN_PLANS = 4096


# Algorithms that leave each rank a slice of the sum.
SCATTERS = ("reduce_scatter", "hierarchical_scatter")


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Rows of a sum that go through all of its steps together. Sizes are in bytes.

    rows: of the chunk. slices: how many of them each rank owns; empty for `gather_sum`, in which nobody owns rows.
    starts: the first row of each slice in the tensor, for a `reduce_scatter` in several chunks; otherwise empty: the
    slices then follow one another.
    """

    rows: int
    slices: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    own_rows: int = 0
    """Rows of this rank's slice."""
    send_sizes: tuple[int, ...] = ()
    """Of the message to each rank in the all-to-all."""
    receive_sizes: tuple[int, ...] = ()
    """Of the message from each rank in the all-to-all; they are equal."""
    slot_size: int = 0
    """Room for one slice's message in the second all-gather: that of the longest slice."""
    own_size: int = 0
    """What this rank's message takes of its slot."""
    raw_send_sizes: tuple[int, ...] = ()
    """Of a hierarchical sum: of the rows, as they are, that go to each rank of the island."""
    raw_receive_sizes: tuple[int, ...] = ()
    """Of a hierarchical sum: of those from each rank of the island."""
    share: tuple[int, ...] = ()
    """Of a hierarchical sum: rows of each message that this rank makes of its share."""


@dataclass(frozen=True, slots=True, eq=False)
class SumPlan:
    """One sum of a `[..., hidden]` tensor over `ranks` ranks, as rank `rank` takes part in it."""

    algorithm: str
    """`gather_sum`, `two_step`, `hierarchical`, `reduce_scatter` or `hierarchical_scatter`."""
    first: Codec
    second: Codec
    """Of the second phase of `two_step`, also where that is what goes between islands."""
    ranks: int
    rank: int
    hidden: int
    chunks: tuple[Chunk, ...]
    values: int
    """Of the whole tensor."""
    message_bytes: int
    """The tensor as it travels, counted once: the mean of both phases."""
    received_bytes: int
    """What this rank receives from the others."""
    out_rows: int
    """Along dim 0 of the result."""
    topology: Topology | None = None
    """Of a hierarchical sum."""
    across: str = ""
    """What goes between the islands of a hierarchical all-reduce: `gather_sum` or `two_step`."""

    @property
    def scatters(self) -> bool:
        return self.algorithm in SCATTERS

    @property
    def exchanges(self) -> int:
        """That every chunk goes through, one after another."""
        flat = {"two_step": 2}.get(self.across or self.algorithm, 1)
        return flat + 2 if self.algorithm == "hierarchical" else flat + (self.algorithm == "hierarchical_scatter")

    @property
    def row_counts(self) -> list[int]:
        """Rows of each chunk."""
        return [chunk.rows for chunk in self.chunks]


@lru_cache(maxsize=KNOWN_PLANS)
def plan_all_reduce(
    shape: tuple[int, ...],
    codec: Codec | CodecPair,
    ranks: int,
    rank: int,
    algorithm: str = "auto",
    chunks: int | None = None,
    chunk_bytes: int | None = None,
    topology: Topology | None = None,
    itemsize: int = 2,
) -> SumPlan:
    """The plan of an all-reduce of a tensor of `shape` `[..., hidden]`.

    chunks: into how many the rows are cut, as far as there are rows; without it into as many as have `chunk_bytes` of a
    message each, and without that into one.
    topology: what `hierarchical` goes by, and what `auto` may choose it for. itemsize: bytes per value of the tensor.
    Raises ValueError for an unknown algorithm, and for two codecs with `gather_sum`.
    """
    algorithm = choose_algorithm(shape, codec, ranks, algorithm, islands=topology and topology.islands)
    first, second = step_codecs(codec)
    if 0 in shape:
        return SumPlan(algorithm, first, second, ranks, rank, shape[-1], (), 0, 0, 0, shape[0])
    rows, hidden, values = math.prod(shape[:-1]), shape[-1], math.prod(shape)
    if algorithm == "hierarchical":
        islands = topology.islands
        across, slices = flat_across(codec, islands), islands.shares * len(islands.members)
        received = sum(received_by_level(shape, codec, algorithm, islands, rank, itemsize))
    else:
        topology, across, slices = None, "", ranks
        received = received_bytes(shape, codec, ranks, algorithm, rank)
    if chunks is None:
        chunks = most_chunks(shape, codec, ranks, chunk_bytes, topology and topology.islands) if chunk_bytes else 1

    def make(count: int) -> Chunk:
        if topology is not None:
            return _hierarchical(count, hidden, first, second, topology, across, itemsize)
        return Chunk(count) if algorithm == "gather_sum" else _two_step(count, hidden, first, second, ranks, rank)

    return SumPlan(
        algorithm,
        first,
        second,
        ranks,
        rank,
        hidden,
        tuple(map(make, exchange.chunk_rows(rows, slices, chunks))),
        values,
        (first.message_bytes(shape) + second.message_bytes(shape)) // 2,
        received,
        shape[0],
        topology,
        across,
    )


@lru_cache(maxsize=KNOWN_PLANS)
def plan_reduce_scatter(
    shape: tuple[int, ...],
    codec: Codec,
    ranks: int,
    rank: int,
    splits: tuple[int, ...] | None = None,
    chunk_bytes: int | None = None,
    topology: Topology | None = None,
    itemsize: int = 2,
) -> SumPlan:
    """The plan of a reduce-scatter along dim 0 of a tensor of `shape` `[rows, ..., hidden]`.

    splits: rows of each rank's slice; without it they are equal. chunk_bytes, itemsize: as in `plan_all_reduce`.
    topology: of the hierarchical way, among islands of one size; None: the flat one.
    Raises ValueError if they do not make up dim 0.
    """
    hidden, inner = shape[-1], math.prod(shape[1:-1])
    split_rows = scatter_rows(shape, ranks, splits)
    algorithm = "reduce_scatter" if topology is None else "hierarchical_scatter"
    if 0 in shape:
        return SumPlan(algorithm, codec, codec, ranks, rank, shape[-1], (), 0, 0, 0, split_rows[rank])
    slices = [count * inner for count in split_rows]
    longest = max(slices)
    whole = ranks * codec.message_bytes((longest, hidden))
    counts = exchange.chunk_rows(longest, 1, exchange.most_chunks(longest, 1, whole, chunk_bytes) if chunk_bytes else 1)
    # All slices are cut where the longest one is; shorter ones end early.
    firsts = [end - count for count, end in zip(counts, itertools.accumulate(counts), strict=True)]
    offsets = [end - rows for rows, end in zip(slices, itertools.accumulate(slices), strict=True)]
    if topology is None:
        received = received_bytes_scatter(shape, codec, ranks, rank, splits)
    else:
        received = sum(received_by_level_scatter(shape, codec, topology.islands, rank, itemsize, splits))
    chunks = []
    for start, count in zip(firsts, counts, strict=True):
        pieces = tuple(max(0, min(count, rows - start)) for rows in slices)
        if topology is not None:
            starts = tuple(offset + start for offset in offsets)
            chunks.append(_scattered_by_level(pieces, starts, hidden, codec, topology, itemsize))
        else:
            starts = tuple(offset + start for offset in offsets) if len(counts) > 1 else ()
            chunks.append(_scattered(pieces, starts, hidden, codec, ranks, rank))
    return SumPlan(
        algorithm,
        codec,
        codec,
        ranks,
        rank,
        hidden,
        tuple(chunks),
        math.prod(shape),
        codec.message_bytes(shape),
        received,
        split_rows[rank],
        topology,
    )


def _two_step(rows: int, hidden: int, first: Codec, second: Codec, ranks: int, rank: int) -> Chunk:
    slices = tuple(slice_rows((rows, hidden), ranks))
    sent = tuple(first.message_bytes((count, hidden)) for count in slices)
    return Chunk(
        rows,
        slices,
        own_rows=slices[rank],
        send_sizes=sent,
        receive_sizes=(sent[rank],) * ranks,
        slot_size=second.message_bytes((slices[0], hidden)),  # no slice is longer than the first
        own_size=second.message_bytes((slices[rank], hidden)),
    )


def _hierarchical(
    rows: int, hidden: int, first: Codec, second: Codec, topology: Topology, across: str, itemsize: int
) -> Chunk:
    """slices: of every message that the island's ranks have in the end, those of each share after another."""
    islands, machines = topology.islands, len(topology.islands.members)
    mates = len(islands.members[topology.island])
    shares = slice_rows((rows, hidden), islands.shares)
    cut = [slice_rows((count, hidden), machines) if across == "two_step" else [count] for count in shares]
    raw = [count * hidden * itemsize for count in shares] + [0] * (mates - islands.shares)
    share = cut[topology.place] if topology.owns_share else []
    sent = tuple(first.message_bytes((count, hidden)) for count in share)
    own_rows = share[topology.island if across == "two_step" else 0] if share else 0
    two_phases = across == "two_step" and bool(share)
    return Chunk(
        rows,
        tuple(itertools.chain(*cut)),
        own_rows=own_rows,
        send_sizes=sent if two_phases else (),
        receive_sizes=(sent[topology.island],) * machines if two_phases else (),
        slot_size=second.message_bytes((cut[0][0], hidden)),
        own_size=second.message_bytes((own_rows, hidden)),
        raw_send_sizes=tuple(raw),
        raw_receive_sizes=(raw[topology.place],) * mates,
        share=tuple(share),
    )


def _scattered(
    slices: tuple[int, ...], starts: tuple[int, ...], hidden: int, codec: Codec, ranks: int, rank: int
) -> Chunk:
    sent = tuple(codec.message_bytes((count, hidden)) for count in slices)
    return Chunk(
        sum(slices), slices, starts, own_rows=slices[rank], send_sizes=sent, receive_sizes=(sent[rank],) * ranks
    )


def _scattered_by_level(
    slices: tuple[int, ...], starts: tuple[int, ...], hidden: int, codec: Codec, topology: Topology, itemsize: int
) -> Chunk:
    """slices, starts: of every rank's rows, by place and then by island, as they go to the ranks of the places."""
    islands, machines = topology.islands, len(topology.islands.members)
    order = [rank for place in range(islands.shares) for rank in islands.across(place)]
    slices, starts = tuple(slices[rank] for rank in order), tuple(starts[rank] for rank in order)
    of_places = [slices[first : first + machines] for first in range(0, len(slices), machines)]
    raw = tuple(sum(rows) * hidden * itemsize for rows in of_places)
    share = of_places[topology.place]
    sent = tuple(codec.message_bytes((count, hidden)) for count in share)
    return Chunk(
        sum(slices),
        slices,
        starts,
        own_rows=share[topology.island],
        send_sizes=sent,
        receive_sizes=(sent[topology.island],) * machines,
        raw_send_sizes=raw,
        raw_receive_sizes=(raw[topology.place],) * islands.shares,
        share=share,
    )
