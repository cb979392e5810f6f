# SPDX-License-Identifier: Apache-2.0
"""Hierarchical sums: the ranks of a machine add up what they have first, so that only sums travel between machines.

Legend: M islands (`topology.py`) of L ranks, which own one of S shares of the rows each; S = L where islands are equal.

    inside   all-to-all of the rows as they are; each share is summed in fp32, in rank order, and encoded in one go
    across   gather_sum or two_step of the share, among the ranks of equal place in all islands
    inside   all-gather of the messages that came from across; every rank decodes all shares in one call

So one machine's link carries what M ranks would exchange, not M L. Quantized is once (`gather_sum` across) or twice,
whatever L is. All ranks decode the same messages in the same order, and end with the same bits.
"""

import torch
import torch.distributed as dist

from . import exchange
from .plan import Chunk, SumPlan
from .spans import span


def all_reduce(
    x: torch.Tensor,
    out: torch.Tensor,
    plan: SumPlan,
    chunk: Chunk,
    group: dist.ProcessGroup | None,
    async_op: bool,
) -> exchange.Steps:
    """`[rows, hidden]` of the chunk to their sum over the group. A rank without a share takes part inside alone."""
    topology, machines = plan.topology, len(plan.topology.islands.members)
    two_phases, owns = plan.across == "two_step", topology.owns_share
    raw, work = _exchange_raw(x, chunk, plan, async_op)
    yield
    exchange.finish(work)
    # Nobody reads what a short message leaves of its slot, nor the slots of ranks without a share.
    slots = x.new_empty(machines, chunk.slot_size, dtype=torch.uint8)
    slot, work = slots[0], None
    if owns:
        with span("encode"):
            sent = plan.first.sum_encode(raw, chunk.share, None if two_phases else slot[: chunk.own_size])
    if two_phases:
        if owns:
            with span("exchange"):
                received, work = exchange.all_to_all(
                    sent, chunk.send_sizes, chunk.receive_sizes, topology.across, async_op
                )
        yield
        exchange.finish(work)
        if owns:
            with span("sum"):
                messages, shape = received.view(machines, -1), (chunk.own_rows, plan.hidden)
                plan.first.decode_sum_encode(messages, shape, plan.second, slot[: chunk.own_size])
    if owns:
        with span("exchange"):
            slots, work = exchange.all_gather(slot, machines, topology.across, async_op)
    yield
    exchange.finish(work)
    with span("exchange"):
        mates = len(topology.islands.members[topology.island])
        gathered, work = exchange.all_gather(slots.view(-1), mates, topology.inside, async_op)
    yield exchange.NEAR
    exchange.finish(work)
    with span("decode"):
        slots = gathered[: topology.islands.shares].view(-1, chunk.slot_size)
        # After `gather_sum` a share is the sum of its slots, in island order; after `two_step` each slot has a sum of
        # its own rows.
        last, each = (plan.second, 1) if two_phases else (plan.first, machines)
        last.decode_slices(slots, chunk.slices, out, each)


def reduce_scatter(
    x: torch.Tensor,
    out: torch.Tensor,
    plan: SumPlan,
    chunk: Chunk,
    group: dist.ProcessGroup | None,
    async_op: bool,
) -> exchange.Steps:
    """x: all rows, of which the chunk has some of every rank's. out: this rank's rows of the chunk.

    Rows go to the rank of the island that has their owner's place, and their sum across to the owner.
    """
    topology = plan.topology
    cuts = zip(chunk.starts, chunk.slices, strict=True)
    # One all-to-all takes each rank's rows in one piece, and those of a place are as many pieces as islands.
    raw, work = _exchange_raw(torch.cat([x[first : first + rows] for first, rows in cuts]), chunk, plan, async_op)
    yield
    exchange.finish(work)
    with span("encode"):
        sent = plan.first.sum_encode(raw, chunk.share)
    with span("exchange"):
        received, work = exchange.all_to_all(sent, chunk.send_sizes, chunk.receive_sizes, topology.across, async_op)
    yield
    exchange.finish(work)
    with span("decode"):
        messages = received.view(len(topology.islands.members), -1)
        plan.first.decode_sum(messages, out.shape, out.dtype, out)


def _exchange_raw(
    rows: torch.Tensor, chunk: Chunk, plan: SumPlan, async_op: bool
) -> tuple[torch.Tensor, dist.Work | None]:
    """Every share's rows to the rank of this island that owns it: (`[L, rows, hidden]` of this rank's, work)."""
    with span("exchange"):
        sent = rows.contiguous().view(-1).view(torch.uint8)
        received, work = exchange.all_to_all(
            sent, chunk.raw_send_sizes, chunk.raw_receive_sizes, plan.topology.inside, async_op
        )
    parts = received.view(rows.dtype).view(len(chunk.raw_receive_sizes), sum(chunk.share), plan.hidden)
    return parts, work
