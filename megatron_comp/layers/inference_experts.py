# SPDX-License-Identifier: Apache-2.0
"""Experts' sums in layers of `transformer_impl: inference_optimized`, which Megatron-Core has from 0.19 on.

Beside the dispatcher of training such a layer has one that it takes under an inference engine: it gathers the tokens of
all expert-parallel ranks, and scatters the sums over these ranks. The one over NCCL is compressed. That over NVLink
adds up inside of the switch, where nothing can be compressed.
"""

from types import MethodType

import torch
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher

from .reducer import Reducer

COMPRESSIBLE = "NCCLAllGatherDispatcher"


def inference_dispatcher(layer: BaseMoELayer) -> MoEAllGatherTokenDispatcher | None:
    """The dispatcher that inference-optimized layers take under an engine."""
    return getattr(layer, "_inference_token_dispatcher", None)


def attach(dispatcher: MoEAllGatherTokenDispatcher, reducer: Reducer) -> None:
    """Scatters sums through `reducer`; `detach` undoes it."""
    dispatcher.reducer = reducer
    dispatcher.token_combine = MethodType(_token_combine, dispatcher)


def detach(dispatcher: MoEAllGatherTokenDispatcher) -> None:
    """The stock sum again; does nothing where it never left."""
    for name in ("reducer", "token_combine"):
        vars(dispatcher).pop(name, None)


def _token_combine(dispatcher: MoEAllGatherTokenDispatcher, hidden_states: torch.Tensor) -> torch.Tensor:
    """In place of the dispatcher's method: `[tokens of all ranks, hidden]` to the sums of this rank's tokens, in bf16.

    Ranks may have different numbers of tokens in steps outside of CUDA graphs.
    """
    stock, reducer = type(dispatcher), dispatcher.reducer
    rows = stock._local_tokens_per_rank if stock._use_allgather_v else None
    choice = reducer.choose(hidden_states.shape, hidden_states, True, rows)
    if choice.plan is not None:
        return reducer(hidden_states, scatter=True, splits=rows).to(torch.bfloat16)
    with reducer.meter.clock(reducer.meter.record(choice, hidden_states.is_cuda)):
        return stock.token_combine(dispatcher, hidden_states)
