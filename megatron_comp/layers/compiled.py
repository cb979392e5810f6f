# SPDX-License-Identifier: Apache-2.0
"""Sums inside of torch.compile: one operator that the compiler need not look into.

It names its reducer by a number. What the sum does, and what is counted, is decided when the compiled code runs, by the
phase that the model is in then; the compiler knows of the result's shape alone.
"""

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch

_reducers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_handles = itertools.count()


def register(reducer: Any) -> int:
    """The number by which the operator knows this reducer, for as long as something else holds it."""
    handle = next(_handles)
    _reducers[handle] = reducer
    return handle


@torch.library.custom_op(
    "megatron_comp::reduce",
    mutates_args=(),
    schema="(Tensor partial, int handle, bool scatter, int[]? splits) -> Tensor",
)
def reduce(partial: torch.Tensor, handle: int, scatter: bool, splits: Sequence[int] | None) -> torch.Tensor:
    """`Reducer.__call__`, in eval mode."""
    reducer = _reducers[handle]
    untouched = reducer.choose(partial.shape, partial, scatter, splits).plan is None or partial.numel() == 0
    # An operator must not change its input or return it, which Megatron's own sums do.
    return reducer(partial.clone() if untouched else partial, scatter, splits=splits)


@reduce.register_fake
def _shape_only(partial: torch.Tensor, handle: int, scatter: bool, splits: Sequence[int] | None) -> torch.Tensor:
    if not scatter:
        return partial.new_empty(partial.shape)
    group = _reducers[handle].group
    rows = splits[group.rank()] if splits else partial.shape[0] // group.size()
    return partial.new_empty(rows, *partial.shape[1:])
