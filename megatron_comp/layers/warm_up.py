# SPDX-License-Identifier: Apache-2.0
"""Which kernels the sums of a model need on a GPU: compiled before the first request."""

from collections.abc import Iterator
from typing import Any

import torch

from ..policy import PHASES, CompressionPolicy
from ..wire.backends import SumKind, warm_up
from ..wire.codec import Codec, CodecPair, parse_codec
from ..wire.cost import FLAT
from ..wire.traffic import flat_across, step_codecs
from .places import Place


def compile_kernels(model: torch.nn.Module, places: list, policy: CompressionPolicy, topologies: dict) -> None:
    """Kernels of a GPU are compiled here, not in the first request; raises RuntimeError if that cannot be done."""
    parameter = next(model.parameters())
    kinds = {
        kind
        for place in (places if parameter.is_cuda else [])
        for name in codec_names(policy, place)
        for kind in _kinds(place, parse_codec(name), policy, parameter.dtype, topologies)
    }
    for kind in kinds:
        warm_up(kind, parameter.device)


def _kinds(
    place: Place, codec: Codec | CodecPair, policy: CompressionPolicy, dtype: torch.dtype, topologies: dict
) -> Iterator[SumKind]:
    """Of all sums that a place may ask for."""
    ranks = place.group.size()
    config: Any = place.module.config
    if ranks == 1:
        return
    first, second = (each.format for each in step_codecs(codec))
    flat = FLAT if policy.algorithm in ("auto", "hierarchical") else (policy.algorithm,)
    for way in ("reduce_scatter",) if config.sequence_parallel else flat:
        if way != "gather_sum" or not isinstance(codec, CodecPair):
            yield SumKind(first, second, dtype, config.hidden_size, ranks, way)
    topology = topologies.get(place.group)
    if topology and topology.islands.have_two_levels:
        islands = topology.islands
        across = "reduce_scatter" if config.sequence_parallel else flat_across(codec, islands)
        mates = len(islands.members[topology.island])
        yield SumKind(first, second, dtype, config.hidden_size, len(islands.members), across, mates, islands.shares)


def codec_names(policy: CompressionPolicy, place: Place) -> set[str]:
    """Names of the codecs that a place uses, in any phase."""
    return {policy.codec_name(place.layer, place.site, phase) for phase in PHASES} - {"none"}
