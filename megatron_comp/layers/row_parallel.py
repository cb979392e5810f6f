# SPDX-License-Identifier: Apache-2.0
"""Megatron's `RowParallelLinear` with a compressed reduction."""

from types import MethodType

import torch
from megatron.core.tensor_parallel import RowParallelLinear

from ..policy import CompressionPolicy
from ..wire.codec import CodecPair, parse_codec
from .predictor import Known
from .reducer import Reducer, SumInParts

# Megatron names the place of a linear by the buffer that Transformer Engine would use for it.
SITE_OF_BUFFER = {"proj": "attention", "fc2": "mlp"}


class CompressedRowParallelLinear(RowParallelLinear):
    """`y = x @ W.T`, W split along its input, the ranks' partial sums reduced as a policy says.

    x `[sequence, batch, input / N]`; y `[sequence, batch, output]`, with sequence parallelism `[sequence / N, ...]`.
    Weights, checkpoints and bias handling are the stock class's. In a hand-written layer spec, give `policy=` (as
    `ModuleSpec(module=..., params={"policy": policy})`, or `functools.partial` where Megatron calls builders directly);
    without one it does what the stock class does until `apply_compression` gives it one.

    policy: must not have `layers`, `phases` or `logits`, of which a linear alone knows nothing: those are for
        `apply_compression`.
    site: a policy's name of the place; taken from `tp_comm_buffer_name` where Megatron gives that.
    """

    def __init__(self, *args, policy: CompressionPolicy | None = None, site: str | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if policy is None:
            return
        site = site or SITE_OF_BUFFER.get(kwargs.get("tp_comm_buffer_name", ""))
        if site is None:
            raise ValueError("CompressedRowParallelLinear cannot tell its place here: give site='attention' or 'mlp'")
        if self.config.num_moe_experts:
            raise ValueError(
                "a linear in a spec cannot tell shared experts from an MLP; use apply_compression on the model"
            )
        if unknown := [key for key in ("layers", "phases", "logits") if getattr(policy, key)]:
            raise ValueError(
                f"policy: {unknown[0]}: a linear in a spec knows no layer number, no phase and no logits; "
                "use apply_compression on the model"
            )
        attach(self, Reducer(policy, None, site, self.tp_group))


def attach(linear: RowParallelLinear, reducer: Reducer) -> None:
    """Sums the linear's products through `reducer` from now on. The linear keeps its class, and that its forward.

    Megatron's switch `explicit_expert_comm` says that somebody else reduces: its forward then returns what
    `_forward_impl` gives it. That is the sum already, so that hooks, and quantizers of outputs, see what they see in a
    stock linear. With it Megatron-Bridge takes the linear for one of overlapped shared experts, whose adapters do not
    scatter: under sequence parallelism attach its LoRA adapters first, and compress then.

    Raises ValueError for a linear that cannot be compressed.
    """
    check_reducible(linear, reducer.codecs)
    linear.explicit_expert_comm = True
    linear.reducer = reducer
    linear._forward_impl = MethodType(_summed_product, linear)


def detach(linear: RowParallelLinear) -> None:
    """Back to the stock reduction."""
    linear.explicit_expert_comm = False
    del linear.reducer, linear._forward_impl


def _summed_product(linear: RowParallelLinear, input: torch.Tensor, weight: torch.Tensor, **how):
    """In place of the linear's `_forward_impl`: the product, summed over the ranks.

    Without a reducer, as for the time in which the layer sums in its place, the partial sum.
    """
    reducer = linear.reducer
    if reducer is not None and input.shape[0] > 1 and len(rows := part_rows(linear, reducer, input)) > 1:
        return send_parts(linear, reducer, rows, input, weight, **how).wait()
    if torch.compiler.is_compiling():
        how["tp_group"] = linear.tp_group  # Megatron would look for it, and warn, which a compiler cannot follow
    # Asked of the class each time: ModelOpt changes that of linears which are compressed already.
    partial = type(linear)._forward_impl(linear, input, weight, **how)
    return partial if reducer is None else reducer(partial, linear.sequence_parallel, linear.training)


def part_rows(linear: RowParallelLinear, reducer: Reducer, input: torch.Tensor) -> list[int]:
    """Rows of the parts in which the linear computes and sends; a single part where it computes all at once.

    So it does under sequence parallelism, where every part would have rows of all ranks' slices, and where its forward
    is not Megatron's own: a quantizer may look at all rows.
    """
    if linear.sequence_parallel or type(linear).forward is not RowParallelLinear.forward:
        return [input.shape[:-1].numel()]
    return reducer.part_rows((*input.shape[:-1], linear.output_size), input)


def send_parts(
    linear: RowParallelLinear,
    reducer: Reducer,
    rows: list[int],
    input: torch.Tensor,
    weight: torch.Tensor,
    known: Known | None = None,
    **how,
) -> SumInParts:
    """Multiplies the rows in parts, each of them on its way while the next is computed. known: what need not travel."""
    total = reducer.begin(input.new_empty(*input.shape[:-1], linear.output_size))
    known_parts = known.split(rows) if known else [None] * len(rows)
    for part, known_part in zip(input.reshape(-1, 1, input.shape[-1]).split(rows), known_parts, strict=True):
        partial = type(linear)._forward_impl(linear, part, weight, **how)
        total.push(partial if known_part is None else known_part.less_own(partial))
    return total


def runs_forward_of(stock: type, linear: object) -> bool:
    """Whether the linear's forward is that of Megatron's class `stock`, or ModelOpt's, which quantizes around it."""
    classes = type(linear).__mro__
    if stock not in classes:
        return False
    before = classes[: classes.index(stock)]
    return all("forward" not in vars(cls) or cls.__module__.startswith("modelopt.") for cls in before)


def check_reducible(linear: RowParallelLinear, codecs: set[str]) -> None:
    """Raises ValueError for a linear whose partial sums cannot be reduced in its place, or not in these codecs."""
    if not runs_forward_of(RowParallelLinear, linear):
        raise ValueError(
            f"{type(linear).__name__} is a row-parallel linear with a forward of its own, which cannot be compressed"
        )
    check_one_codec(codecs, linear.sequence_parallel)
    if not linear.skip_bias_add:
        raise ValueError(
            f"{linear} adds its bias itself; compression needs skip_bias_add=True, as Megatron's layers have"
        )
    if linear.is_expert:
        raise ValueError(f"{linear} belongs to an expert, whose partial sums the token dispatcher reduces")


def check_one_codec(codecs: set[str], sequence_parallel: bool) -> None:
    """Raises ValueError for two codecs where there is one phase."""
    if sequence_parallel and (pairs := [name for name in codecs if isinstance(parse_codec(name), CodecPair)]):
        raise ValueError(f"policy: {pairs[0]!r}: sequence parallelism reduces in one phase and takes one codec")
