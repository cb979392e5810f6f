"""What one sum over ranks does: all that follows from shape, codec, algorithm and group, worked out once.

A plan is immutable and shared. Two sums of one shape over one group follow the same plan, in whatever layer they stand.
"""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

from . import exchange
from .codec import Codec, CodecPair
from .cost import (
    choose_algorithm,
    most_chunks,
    received_bytes,
    received_bytes_scatter,
    scatter_rows,
    slice_rows,
    step_codecs,
)

# Plans that are kept: a prompt's length makes one for each codec and phase that a policy names.
KNOWN_PLANS = 4096


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


@dataclass(frozen=True, slots=True, eq=False)
class SumPlan:
    """One sum of a `[..., hidden]` tensor over `ranks` ranks, as rank `rank` takes part in it."""

    algorithm: str
    """`gather_sum`, `two_step` or `reduce_scatter`."""
    first: Codec
    second: Codec
    """Of the second phase of `two_step`."""
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
) -> SumPlan:
    """The plan of an all-reduce of a tensor of `shape` `[..., hidden]`.

    chunks: into how many the rows are cut, as far as there are rows; without it into as many as have `chunk_bytes` of a
    message each, and without that into one.
    Raises ValueError for an unknown algorithm, and for two codecs with `gather_sum`.
    """
    algorithm = choose_algorithm(shape, codec, ranks, algorithm)
    if chunks is None:
        chunks = most_chunks(shape, codec, ranks, chunk_bytes) if chunk_bytes else 1
    first, second = step_codecs(codec)
    if 0 in shape:
        return SumPlan(algorithm, first, second, ranks, rank, shape[-1], (), 0, 0, 0, shape[0])
    counts = exchange.chunk_rows(math.prod(shape[:-1]), ranks, chunks)
    make = _gathered if algorithm == "gather_sum" else _two_step
    return SumPlan(
        algorithm,
        first,
        second,
        ranks,
        rank,
        shape[-1],
        tuple(make(rows, shape[-1], first, second, ranks, rank) for rows in counts),
        math.prod(shape),
        (first.message_bytes(shape) + second.message_bytes(shape)) // 2,
        received_bytes(shape, codec, ranks, algorithm, rank),
        shape[0],
    )


@lru_cache(maxsize=KNOWN_PLANS)
def plan_reduce_scatter(
    shape: tuple[int, ...],
    codec: Codec,
    ranks: int,
    rank: int,
    splits: tuple[int, ...] | None = None,
    chunk_bytes: int | None = None,
) -> SumPlan:
    """The plan of a reduce-scatter along dim 0 of a tensor of `shape` `[rows, ..., hidden]`.

    splits: rows of each rank's slice; without it they are equal. chunk_bytes: as in `plan_all_reduce`.
    Raises ValueError if they do not make up dim 0.
    """
    hidden, inner = shape[-1], math.prod(shape[1:-1])
    split_rows = scatter_rows(shape, ranks, splits)
    if 0 in shape:
        return SumPlan("reduce_scatter", codec, codec, ranks, rank, shape[-1], (), 0, 0, 0, split_rows[rank])
    slices = [count * inner for count in split_rows]
    longest = max(slices)
    whole = ranks * codec.message_bytes((longest, hidden))
    counts = exchange.chunk_rows(longest, 1, exchange.most_chunks(longest, 1, whole, chunk_bytes) if chunk_bytes else 1)
    # All slices are cut where the longest one is; shorter ones end early.
    firsts = [end - count for count, end in zip(counts, itertools.accumulate(counts), strict=True)]
    offsets = [end - rows for rows, end in zip(slices, itertools.accumulate(slices), strict=True)]
    chunks = []
    for start, count in zip(firsts, counts, strict=True):
        pieces = tuple(max(0, min(count, rows - start)) for rows in slices)
        starts = tuple(offset + start for offset in offsets) if len(counts) > 1 else ()
        chunks.append(_scattered(pieces, starts, hidden, codec, ranks, rank))
    return SumPlan(
        "reduce_scatter",
        codec,
        codec,
        ranks,
        rank,
        hidden,
        tuple(chunks),
        math.prod(shape),
        codec.message_bytes(shape),
        received_bytes_scatter(shape, codec, ranks, rank, splits),
        split_rows[rank],
    )


def _gathered(rows: int, hidden: int, first: Codec, second: Codec, ranks: int, rank: int) -> Chunk:
    return Chunk(rows)


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


def _scattered(
    slices: tuple[int, ...], starts: tuple[int, ...], hidden: int, codec: Codec, ranks: int, rank: int
) -> Chunk:
    sent = tuple(codec.message_bytes((count, hidden)) for count in slices)
    return Chunk(
        sum(slices), slices, starts, own_rows=slices[rank], send_sizes=sent, receive_sizes=(sent[rank],) * ranks
    )
