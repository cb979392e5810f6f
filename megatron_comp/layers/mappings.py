# SPDX-License-Identifier: Apache-2.0
"""Compressed counterparts of two mappings in `megatron.core.tensor_parallel.mappings`, with the same backward."""

from collections.abc import Sequence

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)

from ..wire import exchange
from ..wire.codec import Codec, CodecPair
from ..wire.collectives import run
from ..wire.plan import SumPlan, plan_all_reduce, plan_reduce_scatter

Group = torch.distributed.ProcessGroup


def sum_by_plan(
    input_: torch.Tensor, plan: SumPlan, group: Group, input_split_sizes: Sequence[int] | None = None
) -> torch.Tensor:
    """The sum of every rank's `input_` that the plan describes, with the backward of Megatron's own mapping.

    input_split_sizes: of a reduce-scatter, those that the plan was made with.
    """
    if not (input_.requires_grad and torch.is_grad_enabled()):
        return run(plan, input_, group)
    if plan.scatters:
        return _CompressedReduceScatterToSequenceParallelRegion.apply(input_, plan, group, input_split_sizes)
    return _CompressedReduceFromModelParallelRegion.apply(input_, plan, group)


class _CompressedReduceFromModelParallelRegion(torch.autograd.Function):
    """Forward: y = sum over ranks of decode(encode(x)). Backward: identity, as if nothing had been rounded."""

    @staticmethod
    def forward(ctx, input_, plan, group):
        return run(plan, input_, group)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, None, None


class _CompressedReduceScatterToSequenceParallelRegion(torch.autograd.Function):
    """Forward: this rank's slice, along dim 0, of that sum. Backward: all-gather along dim 0."""

    @staticmethod
    def forward(ctx, input_, plan, group, splits):
        ctx.group, ctx.splits = group, splits
        return run(plan, input_, group)

    @staticmethod
    def backward(ctx, grad_output):
        grad = gather_from_sequence_parallel_region(
            grad_output, tensor_parallel_output_grad=False, group=ctx.group, output_split_sizes=ctx.splits
        )
        return grad, None, None, None


class _CopyToModelParallelRegion(torch.autograd.Function):
    """Forward: x. Backward: the sum over ranks. Megatron's own (0.16) leaves a strided gradient as it is."""

    @staticmethod
    def forward(ctx, input_, group):
        ctx.group = group
        return input_.view_as(input_)

    @staticmethod
    def backward(ctx, grad_output):
        return reduce_from_tensor_model_parallel_region(grad_output.contiguous(), group=ctx.group), None


def copy_to_tensor_model_parallel_region(input_: torch.Tensor, group: Group) -> torch.Tensor:
    """What every rank holds, for ranks that each compute a part of what it leads to."""
    return _CopyToModelParallelRegion.apply(input_, group)


def compressed_reduce_from_tensor_model_parallel_region(
    input_: torch.Tensor, codec: Codec | CodecPair, group: Group, algorithm: str = "auto"
) -> torch.Tensor:
    """`[..., hidden]` partial sums to their sum, equal on all ranks of `group`; the gradient passes unchanged."""
    of_bytes = exchange.chunk_bytes(input_.device.type)
    plan = plan_all_reduce(input_.shape, codec, group.size(), group.rank(), algorithm, None, of_bytes)
    return sum_by_plan(input_, plan, group)


def compressed_reduce_scatter_to_sequence_parallel_region(
    input_: torch.Tensor, codec: Codec, group: Group, input_split_sizes: Sequence[int] | None = None
) -> torch.Tensor:
    """`[rows, ..., hidden]` partial sums to this rank's slice, along dim 0, of their sum: an equal one, or by sizes."""
    splits = None if input_split_sizes is None else tuple(input_split_sizes)
    of_bytes = exchange.chunk_bytes(input_.device.type)
    plan = plan_reduce_scatter(input_.shape, codec, group.size(), group.rank(), splits, of_bytes)
    return sum_by_plan(input_, plan, group, splits)
