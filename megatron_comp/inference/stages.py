# SPDX-License-Identifier: Apache-2.0
"""A model in pipeline stages: a forward runs through all of them, and what the last one found reaches the others.

Each rank holds the layers of one stage, split over the stage's tensor-parallel ranks. Activations go from stage to
stage by Megatron's `P2PCommunicator`, as in its schedules; the schedules themselves allocate on CUDA whatever the
device, and Megatron's inference wrapper runs nothing without a KV cache. With one stage nothing is sent.
"""

from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from ..layers.meter import ModelStats

Value = TypeVar("Value")


def forward(model: GPTModel, ids: Tensor, positions: Tensor, **how) -> Tensor | None:
    """This rank's part of a forward of `ids` [b, s]: its stage's layers, after the stage before has sent its output.

    Logits in the last stage, None in the others. how: further arguments of the model. All ranks call this together.
    """
    if model.pp_group.size() == 1:
        return model(ids, positions, None, **how)
    config, (batch, length) = model.config, ids.shape
    if config.sequence_parallel:
        length //= config.tensor_model_parallel_size
    neighbours = P2PCommunicator(model.pp_group, config)
    model.set_input_tensor(neighbours.recv_forward((length, batch, config.hidden_size), model.pre_process))
    out = model(ids, positions, None, **how)
    neighbours.send_forward(out, model.post_process)
    return out if model.post_process else None


def number_from_last(model: GPTModel, number: int) -> int:
    """The number that the last stage gives, on all stages."""
    if model.pp_group.size() == 1:
        return number
    sent = torch.tensor(number, device=next(model.parameters()).device)
    dist.broadcast(sent, _last(model), group=model.pp_group)
    return int(sent)


def from_last(model: GPTModel, value: Value) -> Value:
    """The object that the last stage gives, on all stages."""
    if model.pp_group.size() == 1:
        return value
    sent = [value]
    dist.broadcast_object_list(sent, _last(model), group=model.pp_group)
    return sent[0]


def _last(model: GPTModel) -> int:
    return dist.get_global_rank(model.pp_group, model.pp_group.size() - 1)


def first_layer(model: GPTModel) -> int:
    """The number, in the whole model, of this stage's first layer."""
    return model.decoder.layers[0].layer_number - 1  # Megatron counts from 1, over all stages


def stats_of_all(model: GPTModel, own: ModelStats, tokens: int) -> tuple[ModelStats, int]:
    """(the sites of all stages, bytes that the rank received that received most). All ranks call this together.

    own: this rank's. tokens: that the stages were run on since those began; activations from the stage before count.
    """
    received = own.received_bytes
    if not model.pre_process:
        ranks = model.config.tensor_model_parallel_size if model.config.sequence_parallel else 1
        received += tokens // ranks * model.config.hidden_size * model.config.pipeline_dtype.itemsize
    everyones = [(own.sites, received)] * model.pp_group.size()
    if len(everyones) > 1:
        dist.all_gather_object(everyones, (own.sites, received), group=model.pp_group)
    sites = [site for of_stage, _ in everyones for site in of_stage]
    return ModelStats(sites, own.link, own.not_recognised), max(most for _, most in everyones)
