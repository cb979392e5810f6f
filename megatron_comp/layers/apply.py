# SPDX-License-Identifier: Apache-2.0
"""Turning compression on and off in a built Megatron model, and reading what it did."""

import itertools
import logging
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import torch
from megatron.core.inference.contexts import BaseInferenceContext

from ..policy import PHASES, CompressionPolicy
from ..wire.backends import warm_up
from ..wire.codec import parse_codec
from ..wire.cost import FLAT, step_codecs
from . import logits
from .agreement import agree_on_calibration, compare_ranks, connect_islands, say_once
from .compressed_layer import can_overlap, compress_layer, restore_layer
from .meter import ModelStats, SiteStats
from .not_recognised import find_not_recognised, shortened
from .places import Place, find_places, reducers, restore
from .plans import Plans
from .reducer import Phase, Reducer
from .sync_drop import check_block, dropped_blocks

logger = logging.getLogger(__name__)


def apply_compression(
    model: torch.nn.Module,
    policy: CompressionPolicy | str | Path,
    *,
    timing: bool = False,
    allow_training: bool = False,
) -> torch.nn.Module:
    """Compresses the tensor-parallel reductions of a built Megatron model as `policy` says; returns the model.

    policy: a `CompressionPolicy`, the path of a policy file, or a codec for every sum.

    Weights, state dict and modules stay what they are, with their classes. A model that is compressed already takes the
    new policy, and its counters start again. Every rank must call it. Sums that no policy reaches are named in one
    warning and in `stats`.

    Beside a language model, a vision tower stays uncompressed. A call for the tower alone compresses it, with a policy
    of its own; it must come after one for the whole model, which undoes it.

    Prefill and decode are told apart by the inference context that this very module is called with.

    `min_bytes: auto` and `algorithm: auto` use rank 0's calibration, on every rank of its group: the file that
    MEGATRON_COMP_CALIBRATION names (`assumed`: none), else the one that `megatron-comp calibrate` left for such a
    group, else an assumed link. Which it was is logged.

    timing: `stats` tells seconds too; every reduction then waits for the device.
    allow_training: let gradients pass compressed reductions in training mode.

    Raises ValueError, before anything is changed, where the policy asks for what this model does not have or cannot do,
    if a calibration file is not valid or was measured with another number of ranks, and on every rank if policies or
    package versions differ between ranks.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"apply_compression takes one module, not {type(model).__name__}; call it for each model chunk")
    policy = CompressionPolicy.of(policy)
    places = list(find_places(model))
    hosts = compare_ranks(places, policy, _problem(model, places, policy))
    calibration = agree_on_calibration({group: len(set(names)) for group, names in hosts.items()}, policy)
    topologies = connect_islands(hosts, policy)
    _compile_kernels(model, places, policy, topologies)
    remove_compression(model)
    _warn_of_others(model, places)

    phase = Phase()
    plans = {group: Plans(policy, known, topologies.get(group)) for group, known in calibration.items()}
    for place in places:
        at = policy, place.layer, place.site, place.group, phase
        place.attach(Reducer(*at, timing=timing, allow_training=allow_training, plans=plans[place.group]))
    if policy.logits is not None:
        _gather_candidates(model, policy.logits, phase, timing)
    dropped = dropped_blocks(model, policy)
    for layer in model.modules():
        if layer in dropped or can_overlap(layer):
            compress_layer(layer)
    vars(model)["compression_hook"] = model.register_forward_pre_hook(_phase_hook(phase), with_kwargs=True)
    logger.info("megatron_comp: %d reductions of %s under policy %s", len(places), type(model).__name__, policy)
    return model


def remove_compression(model: torch.nn.Module) -> torch.nn.Module:
    """Every reduction of the model is the stock one again, those of compressed linears in its spec included.

    A model that is not compressed stays as it is. Returns the model. Raises ValueError if CUDA graphs of the model were
    captured: their replays would go on with the sums that they were captured with.
    """
    _refuse_captured_graphs(model)
    for module in model.modules():
        restore_layer(module)
        restore(module)
        logits.restore(module)
        if hook := module.__dict__.pop("compression_hook", None):
            hook.remove()
    return model


def stats(model: torch.nn.Module) -> ModelStats:
    """Calls and bytes of every site, compressed and kept, from `apply_compression` to this moment.

    Where the policy says how logits are gathered they are a site too, `logits`.
    """
    plans = [reducer.plans for reducer in reducers(model)]
    links = dict.fromkeys(each.calibration.source for each in plans if each.policy.predicts)
    return ModelStats(deepcopy(counters(model)), "; ".join(links), find_not_recognised(model))


def counters(model: torch.nn.Module) -> list[SiteStats]:
    """What `stats` copies, as it goes on counting: sums in model order, then gathers of logits."""
    return [each.meter.stats for each in reducers(model)] + [each.meter.stats for each in logits.gathers(model)]


def _problem(model: torch.nn.Module, places: list, policy: CompressionPolicy) -> str | None:
    """Why this model cannot do what the policy asks; None if it can."""
    try:
        _refuse_captured_graphs(model)
        _check_model(model, places)
        _check_policy(policy, places)
        if policy.logits is not None:
            logits.check_output_layers(model, places[0].module.config)
        for layer, number in dropped_blocks(model, policy).items():
            check_block(layer, number)
    except ValueError as error:
        return str(error)
    return None


def _refuse_captured_graphs(model: torch.nn.Module) -> None:
    # Megatron's CudaGraphManager is a module of the layer or block whose graphs it keeps.
    if any(getattr(module, "cudagraph_runners", None) for module in model.modules()):
        raise ValueError(
            "CUDA graphs of this model were captured, and replay the sums that they were captured with: compress it "
            "before the inference engine is built, or call Megatron's cuda_graphs.delete_cuda_graphs() first"
        )


def _check_model(model: torch.nn.Module, places: list) -> None:
    kinds = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    if "TEFusedMLP" in kinds:
        raise ValueError("use_te_op_fuser=True fuses the reduction into the MLP: set it to False to compress")
    if not places:
        raise ValueError(
            f"{type(model).__name__} has no row-parallel linear inside a transformer layer: nothing to compress"
        )


def _check_policy(policy: CompressionPolicy, places: list) -> None:
    policy.check_layers(max(_number_of_layers(place.module.config) for place in places))
    sites = {place.site for place in places} | _sites_of_other_stages(places[0].module.config)
    said = {f"layers: {key}": of for key, of in policy.layers.items() if isinstance(of, Mapping)}
    for where, codecs in {"sites": policy.sites, **said}.items():
        if absent := [site for site, name in codecs.items() if name != "none" and site not in sites]:
            raise ValueError(f"policy: {where}: the model has no {absent[0]}")
    for place in places:
        place.check(_codec_names(policy, place))


def _number_of_layers(config) -> int:
    """Of all pipeline stages, with those that predict further tokens."""
    return config.num_layers + (getattr(config, "mtp_num_layers", None) or 0)


def _codec_names(policy: CompressionPolicy, place: Place) -> set[str]:
    """Names of the codecs that a place uses, in any phase."""
    return {policy.codec_name(place.layer, place.site, phase) for phase in PHASES} - {"none"}


def _sites_of_other_stages(config) -> set[str]:
    """What layers in other pipeline stages may have: a policy is one for all of them."""
    if config.pipeline_model_parallel_size == 1:
        return set()
    experts = {"experts"} if config.num_moe_experts else set()
    shared = {"shared_experts"} if config.moe_shared_expert_intermediate_size else set()
    return {"attention", "mlp"} | experts | shared


def _warn_of_others(model: torch.nn.Module, places: list) -> None:
    """Names the sums that no policy reaches, on one rank of a tensor-parallel group."""
    if (others := find_not_recognised(model)) and places[0].group.rank() == 0:
        say_once(
            logging.WARNING,
            f"{len(others)} sums of {type(model).__name__} are not recognised and stay uncompressed: "
            f"{shortened(others)}. A policy reaches the layers of one language model; for a vision tower call "
            "apply_compression on the tower, too",
        )


def _gather_candidates(model: torch.nn.Module, count: int, phase: Phase, timing: bool) -> None:
    for layer, vocabulary in logits.output_layers(model):
        logits.attach(layer, logits.LogitsGather(count, vocabulary, layer.tp_group, phase, timing))
        if layer.tp_group.rank() == 0:
            say_once(
                logging.WARNING,
                f"logits: {count} candidates of each rank are for greedy decoding, and top-k sampling with k <= "
                f"{count}. Log-probabilities and top-p sampling would be wrong",
            )


def _compile_kernels(model: torch.nn.Module, places: list, policy: CompressionPolicy, topologies: dict) -> None:
    """Kernels of a GPU are compiled here, not in the first request; raises RuntimeError if that cannot be done."""
    parameter = next(model.parameters())
    sums = set()
    for place in places if parameter.is_cuda else []:
        config, ranks = place.module.config, place.group.size()
        flat = FLAT if policy.algorithm in ("auto", "hierarchical") else (policy.algorithm,)
        ways = {("reduce_scatter" if config.sequence_parallel else way, parameter.dtype, ranks) for way in flat}
        if topology := topologies.get(place.group):  # across machines go sums in fp32
            ways |= {(way, torch.float32, len(topology.islands.members)) for way in FLAT}
        sums |= set(itertools.product(_codec_names(policy, place), ways, [config.hidden_size]))
    for name, (way, dtype, ranks), hidden in sorted(sums, key=str):
        if ranks > 1 and not (">" in name and way == "gather_sum"):
            first, second = step_codecs(parse_codec(name))
            warm_up(first.format, second.format, dtype, hidden, ranks, way, parameter.device)


def _phase_hook(phase: Phase):
    def note_phase(_model, args, kwargs) -> None:
        contexts = [each for each in (*args, *kwargs.values()) if isinstance(each, BaseInferenceContext)]
        phase.name = "decode" if any(context.is_decode_only() for context in contexts) else "prefill"

    return note_phase
