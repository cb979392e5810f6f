# SPDX-License-Identifier: Apache-2.0
"""Flat sums, in which all ranks take the same part: what a chunk of rows goes through.

Legend: N ranks; a *slot* is the room for one slice's message in a two-step all-gather.

    gather_sum      encode -> all-gather -> decode and sum                                            one quantization
    two_step        encode slices -> all-to-all -> decode, sum and encode -> all-gather -> decode     two quantizations
    reduce_scatter  encode slices -> all-to-all -> decode and sum                                     one quantization

gather_sum: arXiv 2411.09510, section 3, where a rank's own share stayed exact. two_step: arXiv 2412.04964, algorithm 1.
"""

import torch
import torch.distributed as dist

from . import exchange
from .plan import Chunk, SumPlan
from .spans import span


def gather_sum(
    x: torch.Tensor,
    out: torch.Tensor,
    plan: SumPlan,
    chunk: Chunk,
    group: dist.ProcessGroup | None,
    async_op: bool,
) -> exchange.Steps:
    with span("encode"):
        message = plan.first.encode(x)
    with span("exchange"):
        gathered, work = exchange.all_gather(message, plan.ranks, group, async_op)
    yield
    exchange.finish(work)
    with span("decode"):
        plan.first.decode_sum(gathered, out.shape, out.dtype, out)


def two_step(
    x: torch.Tensor,
    out: torch.Tensor,
    plan: SumPlan,
    chunk: Chunk,
    group: dist.ProcessGroup | None,
    async_op: bool,
) -> exchange.Steps:
    with span("encode"):
        sent = plan.first.encode_slices(x, chunk.slices)
    with span("exchange"):
        received, work = exchange.all_to_all(sent, chunk.send_sizes, chunk.receive_sizes, group, async_op)
    yield
    exchange.finish(work)
    with span("sum"):
        # Nobody reads what a short slice's message leaves of its slot.
        slot = received.new_empty(chunk.slot_size)
        messages, shape = received.view(plan.ranks, -1), (chunk.own_rows, plan.hidden)
        plan.first.decode_sum_encode(messages, shape, plan.second, slot[: chunk.own_size])
    with span("exchange"):
        slots, work = exchange.all_gather(slot, plan.ranks, group, async_op)
    yield
    exchange.finish(work)
    with span("decode"):
        plan.second.decode_slices(slots, chunk.slices, out)


def reduce_scatter(
    x: torch.Tensor,
    out: torch.Tensor,
    plan: SumPlan,
    chunk: Chunk,
    group: dist.ProcessGroup | None,
    async_op: bool,
) -> exchange.Steps:
    """x: all rows, of which the chunk has some of every slice. out: this rank's rows of the chunk."""
    with span("encode"):
        if chunk.starts:
            sent = x.new_empty(sum(chunk.send_sizes), dtype=torch.uint8)
            for message, start, rows in zip(sent.split(chunk.send_sizes), chunk.starts, chunk.slices, strict=True):
                plan.first.encode(x[start : start + rows], message)
        else:
            sent = plan.first.encode_slices(x, chunk.slices)
    with span("exchange"):
        received, work = exchange.all_to_all(sent, chunk.send_sizes, chunk.receive_sizes, group, async_op)
    yield
    exchange.finish(work)
    with span("decode"):
        plan.first.decode_sum(received.view(plan.ranks, -1), out.shape, out.dtype, out)
