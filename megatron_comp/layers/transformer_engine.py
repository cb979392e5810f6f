"""Transformer Engine's row-parallel linears with a compressed reduction.

Megatron's `TERowParallelLinear` reduces inside of Transformer Engine, in parallel mode "row"; without a parallel mode
it returns the partial sum, as Megatron itself has it for overlapped shared experts. `InferenceRowParallelLinear` goes
past Transformer Engine and has a method that multiplies and reduces.

Transformer Engine is imported by Megatron if at all. Nothing here has run with the real one: its logic is tested on a
stand-in whose own reduction raises.
"""

from functools import lru_cache

import torch

from .site import ReductionSite

# Flags under which a linear does not reduce where it can be replaced, and what they must be.
OWN_REDUCTIONS = {
    "tp_comm_overlap": False,
    "symmetric_ar_type": None,
    "inference_fuse_tp_communication": False,
}


class _CompressedTELinear:
    def forward(self, x: torch.Tensor):
        partial, bias = super().forward(x)
        reduce = self.reduction.reduce_scatter if self.sequence_parallel else self.reduction.reduce
        return reduce(partial, self._tp_group, self.training), bias


class _CompressedInferenceLinear:
    def _matmul_reduce_scatter(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return self.reduction.reduce_scatter(torch.matmul(x, self.weight.t()), self.tp_group, self.training)


@lru_cache
def stock_classes() -> dict[type, type]:
    """Each of Megatron's linears on Transformer Engine that can be compressed, and what compresses it."""
    try:
        from megatron.core.extensions.transformer_engine import HAVE_TE, TERowParallelLinear
        from megatron.core.tensor_parallel.inference_layers import InferenceRowParallelLinear
    except Exception:  # a broken installation raises whatever it likes; the model then has no such linear
        return {}
    if not HAVE_TE:
        return {}
    return {TERowParallelLinear: _CompressedTELinear, InferenceRowParallelLinear: _CompressedInferenceLinear}


def reduces(module: torch.nn.Module) -> bool:
    """Whether this is a row-parallel linear of Transformer Engine's that reduces its own output, or would if stock."""
    if not any(isinstance(module, stock) for stock in stock_classes()):
        return False
    return module.parallel_mode == "row" or "reduction" in module.__dict__


def check_te_linear(linear: torch.nn.Module) -> None:
    """Raises ValueError, with the flag to change, for a linear whose partial sums cannot be had."""
    config = linear.config
    if _stock_class(linear) is None:
        raise ValueError(f"{type(linear).__name__} is a linear of Transformer Engine's that cannot be compressed")
    for flag, wanted in OWN_REDUCTIONS.items():
        if getattr(config, flag, wanted) != wanted:
            raise ValueError(
                f"{flag}={getattr(config, flag)!r} has Transformer Engine reduce in a way of its own, which cannot be "
                f"compressed: set {flag}={wanted}"
            )
    if linear.use_bias and not linear.te_return_bias:
        raise ValueError(f"{type(linear).__name__} adds its bias itself; compression needs skip_bias_add=True")
    if not isinstance(linear.weight, torch.nn.Parameter):
        raise ValueError(f"weights of type {type(linear.weight).__name__} cannot be compressed: use unquantized ones")


def attach(linear: torch.nn.Module, reduction: ReductionSite) -> None:
    """Reduce through `reduction` from now on."""
    stock = _stock_class(linear)
    linear.__class__ = _compressed_class(stock)
    linear.reduction, linear.parallel_mode = reduction, None


def detach(linear: torch.nn.Module) -> None:
    """The stock linear again; does nothing to one that is stock."""
    if "reduction" in linear.__dict__:
        del linear.reduction
        linear.__class__, linear.parallel_mode = _stock_class(linear), "row"


def _stock_class(linear: torch.nn.Module) -> type | None:
    for stock in stock_classes():
        if type(linear) in (stock, _compressed_class(stock)):
            return stock
    return None


@lru_cache
def _compressed_class(stock: type) -> type:
    return type(f"Compressed{stock.__name__}", (stock_classes()[stock], stock), {})
