# SPDX-License-Identifier: Apache-2.0
"""Sums over tensor-parallel ranks that stay as they are, and are listed: those that no place of `places.py` stands for,
and those of compressed linears without a policy.

A module has such a sum if it is a row-parallel linear that reduces, local or Transformer Engine's, or if a method of
its class calls one of Megatron's reductions. Functions that such a method calls are not looked into.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from types import CodeType, FunctionType

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from .places import find_places
from .row_parallel import CompressedRowParallelLinear

REDUCTIONS = {
    "reduce_from_tensor_model_parallel_region",
    "reduce_scatter_last_dim_to_tensor_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
}
# Classes that call these: embeddings have no partial sums, and shared experts do so only where they are a place.
KNOWN = (VocabParallelEmbedding, SharedExpertMLP)


def find_not_recognised(model: torch.nn.Module) -> list[str]:
    """Names of the modules in which a model has such sums, each with its class."""
    return find_sums(model, {id(module) for place in find_places(model) for module in place.covered})


def find_sums(model: torch.nn.Module, covered: Collection[int] = ()) -> list[str]:
    """The same of all modules but for those with an `id` in `covered`, and compressed ones."""
    return [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if id(module) not in covered and _sums(module)
    ]


def find_without_policy(model: torch.nn.Module) -> list[str]:
    """Names of the model's compressed linears that sum as the stock class does, as nobody has given them a policy."""
    named = model.named_modules()
    return [name for name, module in named if isinstance(module, CompressedRowParallelLinear) and _sums(module)]


def shortened(names: Iterable[str]) -> str:
    """The same names in one line, those that differ in numbers alone once."""
    return ", ".join(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))


def _sums(module: torch.nn.Module) -> bool:
    if "reducer" in vars(module) or _ranks(module) == 1:
        return False  # compressed by a call for a part of the model; or alone
    if isinstance(module, RowParallelLinear):
        return not module.explicit_expert_comm  # which says that somebody else reduces
    cls: type = type(module)
    return getattr(module, "parallel_mode", None) == "row" or _calls_a_reduction(cls)


def _ranks(module: torch.nn.Module) -> int:
    """Tensor-parallel ranks, those of the module where it says so."""
    for name in ("tp_group", "_tp_group"):
        if isinstance(group := getattr(module, name, None), torch.distributed.ProcessGroup):
            return group.size()
    if not parallel_state.model_parallel_is_initialized():
        return 1
    return parallel_state.get_tensor_model_parallel_world_size()


@lru_cache
def _calls_a_reduction(cls: type) -> bool:
    methods = (each for base in cls.__mro__ if base not in KNOWN for each in vars(base).values())
    return any(REDUCTIONS & set(_names(each.__code__)) for each in methods if isinstance(each, FunctionType))


def _names(code: CodeType) -> Iterator[str]:
    """All names that a function uses, with those in functions inside of it."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)
