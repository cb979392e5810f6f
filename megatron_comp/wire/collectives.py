# SPDX-License-Identifier: Apache-2.0
"""Compressed all-reduce and reduce-scatter: bytes are exchanged, every rank decodes and sums in rank order.

What is exchanged, and in how many steps: `flat.py` and `hierarchical.py`. A rank's own share goes through the codec,
too, so that all ranks end with the same bits.

Large tensors go in chunks of rows, each through all these steps: while one is on the wire, others are encoded and
decoded. Rows share no blocks and every element is summed in rank order, so bits do not depend on the chunks.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, overload

import torch
import torch.distributed as dist

from . import exchange, flat, hierarchical
from .codec import Codec, CodecPair, one_codec, parse_codec
from .cost import choose_scatter
from .plan import SCATTERS, SumPlan, plan_all_reduce, plan_reduce_scatter
from .topology import Topology
from .traffic import scatter_rows


class PendingSum:
    """A sum over ranks that is under way. All ranks must start and wait in one order, as with any collective."""

    def __init__(self, out: torch.Tensor) -> None:
        self._out = out
        self._chunks: list[exchange.Steps] = []

    def start(self, chunk: exchange.Steps) -> None:
        next(chunk)
        self._chunks.append(chunk)

    def wait(self) -> torch.Tensor:
        """The sum. On a GPU the current stream waits, not the host; it must be the stream of the start."""
        while self._chunks:
            self._chunks = [*self._one_further()]
        return self._out

    def _one_further(self) -> Iterator[exchange.Steps]:
        """The chunks that are not done then.

        All go one exchange further before any goes two, so that none keeps another off the wire. Only a chunk whose
        last exchange is a near one is finished as soon as the next chunk's is under way.
        """
        near: exchange.Steps = iter(())
        for chunk in self._chunks:
            step = next(chunk, _DONE)
            next(near, None)
            near = chunk if step is exchange.NEAR else iter(())
            if step is not exchange.NEAR and step is not _DONE:
                yield chunk
        next(near, None)


class PendingAllReduce(PendingSum):
    """An all-reduce into `out` `[..., hidden]` whose rows come in parts, the plan's chunks, from the first to the last.

    `push` takes the next part.
    """

    def __init__(self, out: torch.Tensor, plan: SumPlan, group: dist.ProcessGroup | None) -> None:
        super().__init__(out)
        self._plan, self._group = plan, group
        parts = out.view(-1, plan.hidden).split(plan.row_counts)
        self._to_push, self._to_take = iter(zip(parts, plan.chunks, strict=True)), iter(parts)
        self._exchanges: list[int] = []  # the number of the one that each of the parts under way is in

    def push(self, part: torch.Tensor, async_op: bool = True) -> None:
        """`[..., hidden]`: the next rows, encoded and on their way when this returns; they may be overwritten then."""
        out, chunk = next(self._to_push)
        rows = _kept(part.detach().reshape(out.shape), self._plan)
        self.start(STEPS[self._plan.algorithm](rows, out, self._plan, chunk, self._group, async_op))
        self._exchanges.append(1)

    def advance(self) -> None:
        """All parts but the newest go to their next exchange, if there is one, to be on the wire in what is done next.

        The newest is on the wire meanwhile.
        """
        for place in range(len(self._chunks) - 1):
            self._to_exchange(place, self._exchanges[place] + 1)

    def take(self) -> torch.Tensor | None:
        """The sum of the first part that was not taken yet, `[rows, hidden]`; None after the last, and that ends it."""
        if not self._chunks:
            return None
        # The next part's last exchange begins before this one's is waited for.
        for number in range(2, self._plan.exchanges + 1):
            for place in range(min(2, len(self._chunks))):
                self._to_exchange(place, number)
        next(self._chunks.pop(0), None)
        self._exchanges.pop(0)
        return next(self._to_take)

    def _to_exchange(self, place: int, number: int) -> None:
        if self._exchanges[place] < number <= self._plan.exchanges:
            next(self._chunks[place])
            self._exchanges[place] = number


def all_reduce(
    x: torch.Tensor,
    codec: Codec | CodecPair | str,
    group: dist.ProcessGroup | None = None,
    algorithm: str = "auto",
    async_op: bool = False,
    chunks: int | None = None,
    topology: Topology | None = None,
) -> torch.Tensor | PendingSum:
    """The sum over the group of every rank's `x` `[..., hidden]`, equal to the bit on all ranks; a new tensor.

    With one rank, or no elements, `x` itself. Shape, dtype, codec, algorithm and chunks must be the same on all ranks.

    chunks: into how many the rows are cut, as far as there are rows; by default as many as the size makes worthwhile on
    a slow link. Changes nothing but time.

    async_op: returns a handle whose `wait()` gives that tensor. The call encodes `x`, which may then be overwritten,
    and starts its exchange; decoding, and the second exchange of `two_step`, are left to `wait()`. Handles must be
    waited for in the same order on all ranks.

    topology: which ranks are near one another, from `topology.connect`. `hierarchical` goes by it, and without one, or
    where it has one level, is a flat sum; `auto` may choose `hierarchical` with it.

    codec: with `none` it is torch.distributed's own all-reduce, with equal bits as far as that has them.

    Raises ValueError for a scalar, an unknown codec or algorithm, or two codecs with `gather_sum`, which has one phase.
    """
    if x.dim() == 0:
        raise ValueError("all_reduce needs [..., hidden], not a scalar")
    if codec == "none":
        return _uncompressed(x, slice(None), group, async_op)
    codec = parse_codec(codec) if isinstance(codec, str) else codec
    of_bytes = exchange.chunk_bytes(x.device.type)
    shared = codec, _ranks(group), dist.get_rank(group)
    plan = plan_all_reduce(x.shape, *shared, algorithm, chunks, of_bytes, topology, x.itemsize)
    return run(plan, x, group, async_op)


def reduce_scatter(
    x: torch.Tensor,
    codec: Codec | str,
    group: dist.ProcessGroup | None = None,
    splits: Sequence[int] | None = None,
    async_op: bool = False,
    algorithm: str = "auto",
    topology: Topology | None = None,
) -> torch.Tensor | PendingSum:
    """This rank's slice, along dim 0, of the sum over the group of `x` `[rows, ..., hidden]`.

    splits: rows of each rank's slice, the same on all ranks; without it all slices are equal. async_op: as in
    `all_reduce`. One quantization. With one rank, `x` itself. codec: `none` too, as in `all_reduce`.

    algorithm, topology: `hierarchical` is for islands of one size, of several ranks; anything else is one all-to-all.

    Raises ValueError if the slices do not make up dim 0, for an unknown algorithm, or for two codecs.
    """
    if codec == "none":
        rows, rank = scatter_rows(x.shape, _ranks(group), splits), dist.get_rank(group)
        return _uncompressed(x, slice(sum(rows[:rank]), sum(rows[: rank + 1])), group, async_op)
    codec = one_codec(parse_codec(codec) if isinstance(codec, str) else codec, "reduce_scatter")
    splits = None if splits is None else tuple(splits)
    of_bytes = exchange.chunk_bytes(x.device.type)
    ranks = _ranks(group)
    way = choose_scatter(x.shape, codec, ranks, algorithm, islands=topology and topology.islands)
    topology = topology if way == "hierarchical_scatter" else None
    shared = codec, ranks, dist.get_rank(group)
    plan = plan_reduce_scatter(x.shape, *shared, splits, of_bytes, topology, x.itemsize)
    return run(plan, x, group, async_op)


def _uncompressed(
    x: torch.Tensor, rows: slice, group: dist.ProcessGroup | None, async_op: bool
) -> torch.Tensor | PendingSum:
    """These rows of the stock sum."""
    total = x.detach().clone(memory_format=torch.contiguous_format)

    def steps() -> exchange.Steps:
        work = dist.all_reduce(total, group=group, async_op=async_op)
        yield
        exchange.finish(work)

    pending = PendingSum(total[rows])
    pending.start(steps())
    return pending if async_op else pending.wait()


@overload
def run(
    plan: SumPlan, x: torch.Tensor, group: dist.ProcessGroup | None, async_op: Literal[False] = False
) -> torch.Tensor: ...


@overload
def run(
    plan: SumPlan, x: torch.Tensor, group: dist.ProcessGroup | None, async_op: bool
) -> torch.Tensor | PendingSum: ...


def run(
    plan: SumPlan, x: torch.Tensor, group: dist.ProcessGroup | None, async_op: bool = False
) -> torch.Tensor | PendingSum:
    """The sum that `plan` describes, of every rank's `x` of the plan's shape, or a handle of it.

    A new tensor; with one rank, or no elements, where nothing is to be sent, `x` itself or its empty slice.
    """
    scatters = plan.algorithm in SCATTERS  # as `plan.scatters`, for one call less per sum
    if plan.ranks == 1 or plan.values == 0:
        out = x[: plan.out_rows] if scatters and plan.ranks > 1 else x
        return PendingSum(out) if async_op else out
    out = x.new_empty(plan.out_rows, *x.shape[1:]) if scatters else x.new_empty(x.shape)
    steps, rows, out_rows = STEPS[plan.algorithm], x.detach().reshape(-1, plan.hidden), out.view(-1, plan.hidden)
    if len(plan.chunks) == 1 and not async_op:
        for _ in steps(rows, out_rows, plan, plan.chunks[0], group, False):
            pass
        return out
    rows = _kept(rows, plan) if async_op else rows
    pending = PendingSum(out)
    cuts = plan.row_counts
    # Each chunk of a reduce-scatter reads rows of all slices, and writes some of this rank's.
    parts = itertools.repeat(rows, len(cuts)) if scatters else rows.split(cuts)
    own = out_rows.split([chunk.own_rows for chunk in plan.chunks] if scatters else cuts)
    for part, its_out, chunk in zip(parts, own, plan.chunks, strict=True):
        pending.start(steps(part, its_out, plan, chunk, group, True))
    return pending if async_op else pending.wait()


_DONE = object()
STEPS: dict[str, Callable[..., exchange.Steps]] = {
    "gather_sum": flat.gather_sum,
    "two_step": flat.two_step,
    "hierarchical": hierarchical.all_reduce,
    "reduce_scatter": flat.reduce_scatter,
    "hierarchical_scatter": hierarchical.reduce_scatter,
}


def _kept(rows: torch.Tensor, plan: SumPlan) -> torch.Tensor:
    """What a sum may read until its first exchange is done, whatever becomes of `rows`: a copy, if they are sent as
    they are."""
    return rows.clone() if plan.topology is not None else rows


def _ranks(group: dist.ProcessGroup | None) -> int:
    ranks = dist.get_world_size(group)
    if ranks < 1:
        raise ValueError(f"rank {dist.get_rank()} is not in the group that it was asked to reduce over")
    return ranks
