# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine's row-parallel linears with a compressed reduction. They keep their classes.

Megatron's `TERowParallelLinear` reduces inside of Transformer Engine, in parallel mode "row"; without a parallel mode
it returns the partial sum, as Megatron itself has it for overlapped shared experts. A forward hook sums it. Two kinds
have another seam: `InferenceRowParallelLinear` goes past Transformer Engine, with a method that multiplies and reduces;
Megatron-Bridge's `TERowParallelLinearLayerNorm` has a norm behind the sum, whose input is summed.

Transformer Engine is imported by Megatron if at all. Nothing here has run on a GPU: tests use its real Python with its
C++ replaced, and stand-ins whose own reduction raises.
"""

from contextlib import suppress
from functools import lru_cache, partial
from importlib import import_module
from types import MethodType
from typing import TYPE_CHECKING, TypeGuard

import torch

from .reducer import Reducer
from .row_parallel import runs_forward_of

if TYPE_CHECKING:
    from megatron.core.extensions.transformer_engine import TERowParallelLinear

# Flags under which a linear does not reduce where it can be replaced, and what they must be.
OWN_REDUCTIONS = {
    "tp_comm_overlap": False,
    "symmetric_ar_type": None,
    "inference_fuse_tp_communication": False,
}
NORM_BEHIND_THE_SUM = "TERowParallelLinearLayerNorm"


@lru_cache
def stock_classes() -> tuple[type, ...]:
    """Megatron's linears on Transformer Engine that can be compressed; one that cannot be imported hides no other."""
    found = []
    for module, name in (
        ("extensions.transformer_engine", "TERowParallelLinear"),
        ("tensor_parallel.inference_layers", "InferenceRowParallelLinear"),
    ):
        with suppress(Exception):  # a broken installation raises whatever it likes; the model has no such linear then
            found.append(getattr(import_module(f"megatron.core.{module}"), name))
    # Without Transformer Engine the names stand for mocks.
    return tuple(cls for cls in found if isinstance(cls, type))


def reduces(module: torch.nn.Module | None) -> "TypeGuard[TERowParallelLinear]":
    """Whether this is a row-parallel linear of Transformer Engine's that reduces its own output, or would if stock."""
    return isinstance(module, stock_classes()) and (module.parallel_mode == "row" or "reducer" in module.__dict__)


def norms_its_sum(linear: "TERowParallelLinear") -> bool:
    """Whether the linear's forward ends in a norm of the sum."""
    return any(
        cls.__name__ == NORM_BEHIND_THE_SUM and runs_forward_of(cls, linear) for cls in type(linear).__mro__
    ) and isinstance(getattr(linear, "post_layernorm", None), torch.nn.Module)


def check_te_linear(linear: "TERowParallelLinear") -> None:
    """Raises ValueError, with the flag to change, for a linear whose partial sums cannot be had."""
    config = linear.config
    if not norms_its_sum(linear) and not any(runs_forward_of(stock, linear) for stock in stock_classes()):
        raise ValueError(f"{type(linear).__name__} is a linear of Transformer Engine's that cannot be compressed")
    for flag, wanted in OWN_REDUCTIONS.items():
        if getattr(config, flag, wanted) != wanted:
            raise ValueError(
                f"{flag}={getattr(config, flag)!r} has Transformer Engine reduce in a way of its own, which cannot be "
                f"compressed: set {flag}={wanted}"
            )
    if linear.use_bias and not linear.te_return_bias:
        raise ValueError(f"{type(linear).__name__} adds its bias itself; compression needs skip_bias_add=True")
    if not isinstance(linear.weight, torch.nn.Parameter) and not _multiplies_itself(linear):
        raise ValueError(f"weights of type {type(linear.weight).__name__} cannot be compressed: use unquantized ones")


def attach(linear: "TERowParallelLinear", reducer: Reducer) -> None:
    """Reduce through `reducer` from now on. Without a reducer, as long as it is None, the linear gives partial sums."""
    linear.parallel_mode, linear.reducer = None, reducer
    if norms_its_sum(linear):
        linear.reducer_hook = linear.post_layernorm.register_forward_pre_hook(partial(_sum_input, linear))
    else:
        # Before all other hooks, which see what they see in a stock linear.
        linear.reducer_hook = linear.register_forward_hook(_sum_output, prepend=True)
    if _multiplies_itself(linear):
        linear._matmul_reduce_scatter = MethodType(_multiply_and_sum, linear)


def detach(linear: "TERowParallelLinear") -> None:
    """The stock linear again."""
    linear.reducer_hook.remove()
    linear.parallel_mode = "row"
    del linear.reducer, linear.reducer_hook
    linear.__dict__.pop("_matmul_reduce_scatter", None)


def _sum_output(linear: "TERowParallelLinear", _inputs: tuple, output: tuple) -> tuple:
    if linear.reducer is None or (_multiplies_itself(linear) and not linear.training):
        return output
    total, bias = output
    return linear.reducer(total, linear.sequence_parallel, linear.training), bias


def _sum_input(
    linear: "TERowParallelLinear", _norm: torch.nn.Module, inputs: tuple[torch.Tensor]
) -> tuple[torch.Tensor]:
    return (linear.reducer(inputs[0], linear.sequence_parallel, linear.training),)


def _multiplies_itself(linear: "TERowParallelLinear") -> bool:
    """Whether this is an InferenceRowParallelLinear; in training mode it runs Transformer Engine's forward."""
    return hasattr(type(linear), "_matmul_reduce_scatter")


def _multiply_and_sum(
    linear: "TERowParallelLinear", x: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """In place of the linear's own method, which does what stays uncompressed: over NVLink in its own way."""
    reducer = linear.reducer
    choice = reducer.choose((*x.shape[:-1], linear.weight.size(0)), x, scatter=True)
    if choice.plan is not None:
        return reducer(_product(linear, x), scatter=True)
    with reducer.meter.clock(reducer.meter.record(choice, x.is_cuda)):
        return type(linear)._matmul_reduce_scatter(linear, x, residual)


def _product(linear: "TERowParallelLinear", x: torch.Tensor) -> torch.Tensor:
    """By Megatron's own function where it has one, which knows what weights may have been converted to."""
    from megatron.core.tensor_parallel import inference_layers

    apply_linear = getattr(inference_layers, "_apply_linear", None)
    return apply_linear(x, linear.weight, linear.config) if apply_linear else torch.matmul(x, linear.weight.t())
