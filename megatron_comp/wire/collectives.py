"""Compressed all-reduce and reduce-scatter: bytes are exchanged, every rank decodes and sums in rank order.

Legend: N ranks; a *slot* is the room for one slice's message in a two-step all-gather.

    gather_sum   encode -> all-gather -> decode and sum                                       one quantization
    two_step     encode slices -> all-to-all -> decode and sum -> encode -> all-gather -> decode   two quantizations

A rank's own share goes through the codec like everybody's, so that all ranks end with the same bits
(gather_sum: arXiv 2411.09510, section 3, where the own share stayed exact; two_step: arXiv 2412.04964, algorithm 1).

Large tensors go in chunks of rows, each through all these steps: while one is on the wire, others are encoded and
decoded. Rows share no blocks and every element is summed in rank order, so bits do not depend on the chunks.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from . import exchange
from .codec import Codec, CodecPair, parse_codec
from .cost import choose_algorithm, most_chunks, scatter_rows, slice_rows, step_codecs

# A chunk under way: each `next` carries it to where its bytes are on the wire again, the last one to its sum.
Chunk = Iterator[bool]


class PendingSum:
    """A sum over ranks that is under way. All ranks must start and wait in one order, as with any collective."""

    def __init__(self, out: torch.Tensor) -> None:
        self._out = out
        self._chunks: list[Chunk] = []

    def start(self, chunk: Chunk) -> None:
        next(chunk)
        self._chunks.append(chunk)

    def wait(self) -> torch.Tensor:
        """The sum. On a GPU the current stream waits, not the host; it must be the stream of the start."""
        while self._chunks:
            # All chunks go one exchange further before any goes two, so that none keeps another off the wire.
            self._chunks = [chunk for chunk in self._chunks if next(chunk, False)]
        return self._out


class PendingAllReduce(PendingSum):
    """An all-reduce into `out` `[..., hidden]` whose rows come in parts, from the first to the last, by `push`.

    row_counts: rows of each part, from `exchange.chunk_rows`, which keeps bytes and bits those of one piece.
    algorithm: not `auto`.
    """

    def __init__(
        self,
        out: torch.Tensor,
        row_counts: Sequence[int],
        codec: Codec | CodecPair,
        group: dist.ProcessGroup | None,
        algorithm: str,
    ) -> None:
        super().__init__(out)
        parts = out.view(-1, out.shape[-1]).split(list(row_counts))
        self._to_push, self._to_take = iter(parts), iter(parts)
        self._sum = _gather_sum if algorithm == "gather_sum" else _two_step
        self._codec, self._group = codec, group
        self._in_second_exchange = 0  # how many of the parts under way, the oldest ones

    def push(self, part: torch.Tensor, async_op: bool = True) -> None:
        """`[..., hidden]`: the next rows, encoded and on their way when this returns; they may be overwritten then."""
        out = next(self._to_push)
        self.start(self._sum(part.detach().reshape(out.shape), out, self._codec, self._group, async_op))

    def advance(self) -> None:
        """In `two_step`: all parts but the newest go to their second exchange, to be on the wire in what is done next.

        The newest is on the wire meanwhile.
        """
        self._to_second_exchange(len(self._chunks) - 1)

    def take(self) -> torch.Tensor | None:
        """The sum of the first part that was not taken yet, `[rows, hidden]`; None after the last, and that ends it."""
        if not self._chunks:
            return None
        # The next part's second exchange begins before this one's is waited for.
        self._to_second_exchange(min(2, len(self._chunks)))
        next(self._chunks.pop(0), None)
        self._in_second_exchange -= 1
        return next(self._to_take)

    def _to_second_exchange(self, count: int) -> None:
        if self._sum is _two_step:
            for chunk in self._chunks[self._in_second_exchange : count]:
                next(chunk)
        self._in_second_exchange = max(self._in_second_exchange, count)


def all_reduce(
    x: torch.Tensor,
    codec: Codec | CodecPair | str,
    group: dist.ProcessGroup | None = None,
    algorithm: str = "auto",
    async_op: bool = False,
    chunks: int | None = None,
) -> torch.Tensor | PendingSum:
    """The sum over the group of every rank's `x` `[..., hidden]`, equal to the bit on all ranks; a new tensor.

    With one rank, or no elements, `x` itself. Shape, dtype, codec, algorithm and chunks must be the same on all ranks.

    chunks: into how many the rows are cut, as far as there are rows; by default as many as the size makes worthwhile on
    a slow link. Changes nothing but time.

    async_op: returns a handle whose `wait()` gives that tensor. The call encodes `x`, which may then be overwritten,
    and starts its exchange; decoding, and the second exchange of `two_step`, are left to `wait()`. Handles must be
    waited for in the same order on all ranks.

    Raises ValueError for a scalar, an unknown codec or algorithm, or two codecs with `gather_sum`, which has one phase.
    """
    codec = parse_codec(codec) if isinstance(codec, str) else codec
    if x.dim() == 0:
        raise ValueError("all_reduce needs [..., hidden], not a scalar")
    ranks = _ranks(group)
    algorithm = choose_algorithm(x.shape, codec, ranks, algorithm)
    if ranks == 1 or x.numel() == 0:
        return PendingSum(x) if async_op else x
    chunks = chunks or most_chunks(x.shape, codec, ranks, exchange.chunk_bytes(x.device))
    rows = exchange.chunk_rows(x.shape[:-1].numel(), ranks, chunks)
    pending = PendingAllReduce(x.new_empty(x.shape), rows, codec, group, algorithm)
    for part in x.detach().reshape(-1, x.shape[-1]).split(rows):
        pending.push(part, async_op or len(rows) > 1)
    return pending if async_op else pending.wait()


def reduce_scatter(
    x: torch.Tensor,
    codec: Codec | str,
    group: dist.ProcessGroup | None = None,
    splits: Sequence[int] | None = None,
    async_op: bool = False,
) -> torch.Tensor | PendingSum:
    """This rank's slice, along dim 0, of the sum over the group of `x` `[rows, ..., hidden]`.

    splits: rows of each rank's slice, the same on all ranks; without it all slices are equal. async_op: as in
    `all_reduce`. All-to-alls, one quantization. With one rank, `x` itself. Raises ValueError if the slices do not make
    up dim 0, or for two codecs.
    """
    codec = parse_codec(codec) if isinstance(codec, str) else codec
    if isinstance(codec, CodecPair):
        raise ValueError(f"reduce_scatter has one phase and takes one codec, not {codec}")
    ranks = _ranks(group)
    splits = scatter_rows(x.shape, ranks, splits)
    if ranks == 1:
        return PendingSum(x) if async_op else x
    slices = x.detach().split(splits)
    out = x.new_empty(slices[dist.get_rank(group)].shape)
    pending = PendingSum(out)
    if x.numel():
        # All slices are cut alike, where the longest one is; shorter ones end early.
        longest = max(slices, key=len).shape
        nbytes = ranks * codec.message_bytes(longest)
        chunks = exchange.most_chunks(longest[:-1].numel(), 1, nbytes, exchange.chunk_bytes(x.device))
        counts = exchange.chunk_rows(longest[:-1].numel(), 1, chunks)
        cuts = list(zip(*(_split(part.reshape(-1, x.shape[-1]), counts) for part in slices), strict=True))
        for parts, part_of_out in zip(cuts, _split(out.view(-1, x.shape[-1]), counts), strict=True):
            pending.start(_scatter_sum(parts, part_of_out, codec, group, async_op or len(counts) > 1))
    return pending if async_op else pending.wait()


def _gather_sum(
    x: torch.Tensor, out: torch.Tensor, codec: Codec, group: dist.ProcessGroup | None, async_op: bool
) -> Chunk:
    gathered, work = exchange.all_gather(codec.encode(x), group, async_op)
    yield True
    exchange.finish(work)
    codec.decode_sum(gathered, out.shape, out.dtype, out)


def _two_step(
    x: torch.Tensor, out: torch.Tensor, codec: Codec | CodecPair, group: dist.ProcessGroup | None, async_op: bool
) -> Chunk:
    first, second = step_codecs(codec)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    hidden = x.shape[-1]
    rows = slice_rows(x.shape, ranks)

    sent = torch.cat([first.encode(part) for part in x.split(rows)])
    send_sizes = [first.message_bytes((count, hidden)) for count in rows]
    received, work = exchange.all_to_all(sent, send_sizes, [send_sizes[rank]] * ranks, group, async_op)
    yield True
    exchange.finish(work)

    # The first slice is as long as any; shorter ones leave the end of their slot zero.
    slot = received.new_zeros(second.message_bytes((rows[0], hidden)))
    message = first.decode_sum_encode(received.view(ranks, -1), (rows[rank], hidden), second)
    slot[: message.numel()] = message
    slots, work = exchange.all_gather(slot, group, async_op)
    yield True
    exchange.finish(work)

    for part, count, its_slot in zip(out.split(rows), rows, slots, strict=True):
        message = its_slot[: second.message_bytes((count, hidden))]
        second.decode_sum(message.unsqueeze(0), part.shape, out.dtype, part)


def _scatter_sum(
    parts: Sequence[torch.Tensor], out: torch.Tensor, codec: Codec, group: dist.ProcessGroup | None, async_op: bool
) -> Chunk:
    """parts: `[rows, hidden]` for each rank; out: this rank's."""
    sent = torch.cat([codec.encode(part) for part in parts])
    send_sizes = [codec.message_bytes(part.shape) for part in parts]
    ranks = len(parts)
    received, work = exchange.all_to_all(sent, send_sizes, [codec.message_bytes(out.shape)] * ranks, group, async_op)
    yield True
    exchange.finish(work)
    codec.decode_sum(received.view(ranks, -1), out.shape, out.dtype, out)


def _split(x: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
    """`x.split(counts)` of an `x` that may have fewer rows than the counts: the last parts are then short or empty."""
    ends = list(itertools.accumulate(counts))
    return [x[end - count : end] for count, end in zip(counts, ends, strict=True)]


def _ranks(group: dist.ProcessGroup | None) -> int:
    ranks = dist.get_world_size(group)
    if ranks < 1:
        raise ValueError(f"rank {dist.get_rank()} is not in the group that it was asked to reduce over")
    return ranks
