# SPDX-License-Identifier: Apache-2.0
"""Compressed sums of mixture-of-experts layers.

The second linears of experts leave partial sums that Megatron's token dispatcher adds up while it brings the tokens
back. The dispatchers here are the stock ones with that sum compressed. Shared experts are a row-parallel linear like
any other, unless they overlap with the dispatcher, which then calls for their sum.
"""

from types import MethodType, SimpleNamespace

import torch
from megatron.core.transformer.moe import shared_experts
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoETokenDispatcher,
)

from ..wire.codec import CodecPair, parse_codec
from . import inference_experts
from .inference_experts import inference_dispatcher
from .mappings import copy_to_tensor_model_parallel_region
from .reducer import Reducer


class _CompressedDispatcher(MoETokenDispatcher):
    """What both dispatchers share. The reducer's group: the ranks that hold partial sums of the same tokens.

    tokens_stay: without sequence and expert parallelism every rank holds all tokens. The stock dispatchers nevertheless
    gather them from all ranks, compute on every copy, and scatter the sums; these leave the tokens where they are and
    all-reduce once.
    """

    def prepare(self, layer: BaseMoELayer, reducer: Reducer, tokens_stay: bool) -> None:
        self.layer, self.reducer, self.tokens_stay = layer, reducer, tokens_stay

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.tokens_stay:
            # As they are; in a backward, the ranks' parts of their gradients are summed, as gathering them would do.
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, self.reducer.group)
            probs = copy_to_tensor_model_parallel_region(probs, self.reducer.group)
        return super().token_dispatch(hidden_states, probs)

    def add_up(self, partial: torch.Tensor, dtype: torch.dtype, splits: list[int] | None = None) -> torch.Tensor:
        """The sum over ranks: of all rows, or of this rank's. `dtype` is what the stock dispatcher sums in."""
        total = self.reducer(partial.to(dtype), not self.tokens_stay, self.layer.training, splits)
        return total.to(partial.dtype)


class CompressedAllGatherDispatcher(_CompressedDispatcher, MoEAllGatherTokenDispatcher):
    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Tokens in their own order `[tokens of all ranks, hidden]` to those of this rank."""
        return self.add_up(hidden_states, self.local_probs.dtype)


class CompressedAlltoAllDispatcher(_CompressedDispatcher, MoEAlltoAllTokenDispatcher):
    # Megatron's, changed here for the time of a call.
    tp_size: int
    ep_size: int
    shared_experts: SharedExpertMLP | None

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.tokens_stay:
            return super().combine_preprocess(hidden_states)
        # The stock method sorts, and sums if experts are split over ranks. Rows that are padded to a capacity it sorts
        # by the number of all ranks, which stays the same.
        ranks = self.tp_size, self.ep_size
        self.tp_size, self.ep_size = 1, self.tp_size * self.ep_size
        try:
            partial = super().combine_preprocess(hidden_states)
        finally:
            self.tp_size, self.ep_size = ranks
        splits = self.output_splits_tp  # None where all slices have the capacity
        return self.add_up(partial, self.probs.dtype, None if splits is None else splits.tolist())

    def combine_postprocess(self, permutated_local_input_tokens: torch.Tensor) -> torch.Tensor:
        if not self.tokens_stay:
            return super().combine_postprocess(permutated_local_input_tokens)
        # Here, and not on the permuted tokens: of those there are as many copies as experts to a token. What the
        # shared experts add is a sum already.
        shared, self.shared_experts = self.shared_experts, None
        try:
            total = self.add_up(super().combine_postprocess(permutated_local_input_tokens), self.probs.dtype)
        finally:
            self.shared_experts = shared
        if shared is None:
            return total
        if shared.cached_fc2_input is not None:  # Megatron 0.19 has come so far already, in token_combine
            shared.linear_fc2_forward(permutated_local_input_tokens)
            shared.post_forward_comm()
        return total + shared.get_output()


def sum_shared_experts(shared: SharedExpertMLP, reducer: Reducer) -> None:
    """Sums through `reducer` what shared experts give that overlap with the dispatcher: their linears leave it to them.

    `restore_shared_experts` undoes it.
    """
    shared.reducer, shared.post_forward_comm = reducer, MethodType(_sum_as_last_step, shared)


def restore_shared_experts(shared: SharedExpertMLP) -> None:
    """The stock sum again; does nothing where it never left."""
    for name in ("reducer", "post_forward_comm"):
        shared.__dict__.pop(name, None)


def _as_last_step(method):
    """Marks the shared experts' sum as done where Megatron (0.19) keeps a record of their steps."""
    if not hasattr(shared_experts, "overlap_state_check"):
        return method
    states = shared_experts.SharedExpertState
    return shared_experts.overlap_state_check(states.FC2_FORWARD_DONE, states.POST_FORWARD_COMM_DONE)(method)


@_as_last_step
def _sum_as_last_step(shared: SharedExpertMLP) -> None:
    """On the shared experts' stream, `[sequence, batch, hidden]` partial sums to `cached_output`."""
    with torch.cuda.stream(shared.stream):
        partial, scatter = shared.cached_fc2_output, shared.config.sequence_parallel
        shared.cached_output = shared.reducer(partial, scatter, shared.training)
    shared.cached_fc2_output = None


DISPATCHERS = {
    MoEAllGatherTokenDispatcher: CompressedAllGatherDispatcher,
    MoEAlltoAllTokenDispatcher: CompressedAlltoAllDispatcher,
}

# Attributes of a dispatcher that Megatron's engines change between steps: decoded tokens may be padded to a capacity.
SWITCHES = {"drop_and_pad", "moe_expert_capacity_factor"}


def summing_group(layer: BaseMoELayer) -> torch.distributed.ProcessGroup | None:
    """The group over which the stock dispatcher adds up partial sums; None for one that adds up nothing."""
    return _group_of(inference_dispatcher(layer) or stock_dispatcher(layer))


def _group_of(dispatcher: MoETokenDispatcher) -> torch.distributed.ProcessGroup | None:
    gathers = isinstance(dispatcher, MoEAllGatherTokenDispatcher)
    group = dispatcher.tp_ep_group if gathers else dispatcher.tp_group
    return group if group is not None and group.size() > 1 else None


def stock_dispatcher(layer: BaseMoELayer) -> MoETokenDispatcher:
    """Megatron's, that of training where inference-optimized layers have two."""
    own = vars(layer)
    return own.get("_training_token_dispatcher") or own.get("stock_dispatcher", layer.token_dispatcher)


def summing_dispatcher(layer: BaseMoELayer) -> MoETokenDispatcher:
    """The one that has the layer's reducer, if there is any."""
    return inference_dispatcher(layer) or layer.token_dispatcher


def check_experts(layer: BaseMoELayer, codecs: set[str]) -> None:
    """Raises ValueError for a layer whose experts' sums cannot be compressed, or not in these codecs."""
    stay = _tokens_stay(layer)
    if problem := _out_of_reach(layer):
        raise ValueError(f"{problem}, or say sites: {{experts: none}}")
    if not stay and (pairs := [name for name in codecs if isinstance(parse_codec(name), CodecPair)]):
        raise ValueError(
            f"policy: experts: {pairs[0]!r}: with sequence or expert parallelism experts' sums are scattered in one "
            "phase and take one codec"
        )


def prediction_problem(layer: BaseMoELayer) -> str | None:
    """Why experts' sums cannot be predicted from the layer's input; None if they can."""
    if inference_dispatcher(layer):
        return "transformer_impl='inference_optimized' has a token dispatcher of its own; use another transformer_impl"
    if not _tokens_stay(layer):
        return "ranks sum other tokens than they hold; leave out expert parallelism and sequence_parallel"
    return None


class PredictedSum:
    """In the place of a dispatcher's reducer for one call of the layer: takes off what a rank's part of `predict(x)`
    says, sums through `reducer`, and adds what all ranks' parts say.

    x: what the layer's experts are given `[..., hidden]`, before its norm.
    """

    def __init__(self, reducer: Reducer, x: torch.Tensor) -> None:
        self.reducer, self.x, self.group = reducer, x, reducer.group

    def __call__(self, partial: torch.Tensor, *how) -> torch.Tensor:
        predict = self.reducer.predictor_of(partial)
        if predict is None:
            return self.reducer(partial, *how)
        known = predict(self.x)
        return known.plus_total(self.reducer(known.less_own(partial), *how))


def sum_experts(layer: BaseMoELayer, reducer: Reducer) -> None:
    """Gives the layer a dispatcher that sums through `reducer`; `restore_experts` undoes it.

    One that keeps every sum makes the stock dispatcher's own calls, and counts them; a dispatcher that nothing here can
    stand in for then stays as it is, uncounted.
    """
    stock, stay = stock_dispatcher(layer), bool(reducer.codecs) and _tokens_stay(layer)
    if _out_of_reach(layer):
        return
    if dispatcher := inference_dispatcher(layer):
        inference_experts.attach(dispatcher, reducer)
        return
    # To a dispatcher that believes itself alone (a group of None counts as one rank) all tokens are at home.
    groups = SimpleNamespace(
        ep=stock.ep_group, expt_tp=None if stay else stock.tp_group, tp_ep=None if stay else stock.tp_ep_group
    )
    dispatcher = DISPATCHERS[type(stock)](
        stock.num_local_experts, stock.local_expert_indices, config=stock.config, pg_collection=groups
    )
    if stock.shared_experts is not None:
        dispatcher.set_shared_experts(stock.shared_experts)
    dispatcher.prepare(layer, reducer, stay)
    layer.stock_dispatcher, layer.token_dispatcher = stock, dispatcher


def restore_experts(layer: BaseMoELayer) -> None:
    """The stock dispatcher again; does nothing where it never left."""
    if dispatcher := inference_dispatcher(layer):
        inference_experts.detach(dispatcher)
    if "stock_dispatcher" in layer.__dict__:
        ours, layer.token_dispatcher = layer.token_dispatcher, layer.__dict__.pop("stock_dispatcher")
        for name in SWITCHES & vars(ours).keys():
            setattr(layer.token_dispatcher, name, getattr(ours, name))


def _out_of_reach(layer: BaseMoELayer) -> str | None:
    """Why experts' sums cannot be done here, and what would help; None if they can."""
    stock, dispatcher = stock_dispatcher(layer), inference_dispatcher(layer)
    if dispatcher is not None and type(dispatcher).__name__ != inference_experts.COMPRESSIBLE:
        return (
            f"transformer_impl='inference_optimized' has a token dispatcher of its own, {type(dispatcher).__name__}, "
            "that cannot be compressed; set inference_moe_token_dispatcher_type to nccl, use another transformer_impl"
        )
    if dispatcher is not None and _group_of(stock) is not None:
        return (
            f"transformer_impl='inference_optimized' sums by {type(stock).__name__} outside of an engine, which is not "
            "compressed beside the dispatcher of engines; set moe_token_dispatcher_type to alltoall"
        )
    if type(stock) not in DISPATCHERS:
        return (
            f"the token dispatcher {type(stock).__name__} cannot be compressed; set moe_token_dispatcher_type to "
            "allgather or alltoall"
        )
    return None


def _tokens_stay(layer: BaseMoELayer) -> bool:
    """Whether every rank that sums holds all tokens: no sequence parallelism, no expert parallelism, and experts split
    over no more ranks than attention, or some of them would hold another data-parallel rank's tokens."""
    stock = stock_dispatcher(layer)
    return not layer.config.sequence_parallel and stock.ep_size == 1 and stock.tp_size <= layer.attn_tp_group.size()
