# SPDX-License-Identifier: Apache-2.0
"""Turning compression on and off in a built Megatron model, and reading what it did."""

import logging
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.models.common.language_module.language_module import LanguageModule

from ..notices import one_line
from ..policy import CompressionPolicy
from ..wire.together import Together
from . import logits
from .agreement import Said, agree_on_links, check_alike, say_once
from .compressed_layer import can_overlap, compress_layer, restore_layer
from .meter import ModelStats, SiteStats
from .not_recognised import find_not_recognised, find_without_policy, shortened
from .places import find_places, numbered_layers, reducers, restore
from .plans import Plans
from .predictor import Predictors, read_predictors
from .reducer import Phase, Reducer
from .sync_drop import check_block, dropped_blocks, problem_of
from .versions import check_megatron
from .warm_up import codec_names, compile_kernels

logger = logging.getLogger(__name__)


def apply_compression(
    model: torch.nn.Module,
    policy: CompressionPolicy | str | Path,
    *,
    timing: bool = False,
    allow_training: bool = False,
    group: dist.ProcessGroup | None = None,
) -> torch.nn.Module:
    """Compresses the tensor-parallel reductions of a built Megatron model as `policy` says; returns the model.

    model: bare, or inside of Megatron's `Float16Module` and `DistributedDataParallel`.
    policy: a `CompressionPolicy`, the path of a policy file, or a codec for every sum.

    Weights, state dict and modules stay what they are, with their classes. A model that is compressed already takes the
    new policy, and its counters start again. Sums that no policy reaches are named in one warning and in `stats`.

    Every rank of the job must call it, those of a pipeline stage without layers too; where some ranks have no such
    model, `group` is of those that do. Tensor-parallel groups may have different policies.

    Beside a language model, a vision tower stays uncompressed. A call for the tower alone compresses it, with a policy
    of its own; it must come after one for the whole model, which undoes it.

    Prefill and decode are told apart by the inference context that the language model inside of `model`, or else
    `model` itself, is called with.

    `min_bytes: auto` and `algorithm: auto` use rank 0's calibration, on every rank of its group: the file that
    MEGATRON_COMP_CALIBRATION names (`assumed`: none), else the one that `megatron-comp calibrate` left for such a
    group, else an assumed link. Which it was is logged.

    timing: `stats` tells seconds too; every reduction then waits for the device.
    allow_training: let gradients pass compressed reductions in training mode.
    group: the ranks that call this together, by default all of the job. With a group, `auto` leaves `hierarchical` out.

    Raises, before anything is changed: ValueError where the policy is not valid, asks for what this model does not have
    or cannot do, if a calibration file is not valid or was measured with another number of ranks, and if policies or
    package versions differ between ranks that sum together; OSError for a file that cannot be read; RuntimeError for a
    Megatron-Core that is too old. After any other error the model is stock. What one rank finds, all of them raise, as
    a ValueError that names the rank.
    """
    with Together(group) as step:
        check_megatron()
        _check_is_one(model, "apply_compression")
        policy = CompressionPolicy.of(policy)
        if group is not None and (policy.algorithm == "hierarchical" or policy.islands is not None):
            raise ValueError("group: `hierarchical` and `islands` need a call without it, on all ranks of the job")
        places = list(find_places(model))
        _check(model, places, policy)
        predictors = _read_predictors(model, places, policy, allow_training) if policy.predictor and places else None
        groups = list(dict.fromkeys(place.group for place in places))
        has_levels = policy.has_levels and group is None
        step.say(Said.of(policy, groups, predictors.digest if predictors else "", has_levels))
    check_alike(step.everyone)
    calibrations, topologies = agree_on_links(groups, step.everyone, policy, _captures_graphs(places), group)
    try:
        with Together(group):
            compile_kernels(model, places, policy, topologies)
            remove_compression(model)
            _warn_of_others(model, groups)
            plans = {each: Plans(policy, calibrations[each], topologies.get(each)) for each in groups}
            _attach(model, places, plans, policy, predictors, timing, allow_training)
    except BaseException:
        remove_compression(model)
        raise
    logger.info("megatron_comp: %d reductions of %s under policy %s", len(places), type(model).__name__, policy)
    return model


def remove_compression(model: torch.nn.Module) -> torch.nn.Module:
    """Every reduction of the model is the stock one again, those of compressed linears in its spec included.

    A model that is not compressed stays as it is. Returns the model. Raises ValueError if CUDA graphs of the model were
    captured: their replays would go on with the sums that they were captured with.
    """
    _check_is_one(model, "remove_compression")
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

    Where the policy says how logits are gathered they are a site too, `logits`. Sums that are not counted, since no
    policy reaches them or nobody gave one, are named.
    """
    _check_is_one(model, "stats")
    plans = [reducer.plans for reducer in reducers(model)]
    links = dict.fromkeys(each.calibration.source for each in plans if each.policy.predicts)
    return ModelStats(
        deepcopy(counters(model)), "; ".join(links), find_not_recognised(model), find_without_policy(model)
    )


def counters(model: torch.nn.Module) -> list[SiteStats]:
    """What `stats` copies, as it goes on counting: sums in model order, then gathers of logits."""
    return [each.meter.stats for each in reducers(model)] + [each.meter.stats for each in logits.gathers(model)]


def _check_is_one(model: object, what: str) -> None:
    """Megatron's `get_model` gives a list of chunks."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{what} takes one module, not {type(model).__name__}; call it for each model chunk")


def _check(model: torch.nn.Module, places: list, policy: CompressionPolicy) -> None:
    """Raises ValueError if this model cannot do what the policy asks."""
    _refuse_captured_graphs(model)
    _check_model(model, places, policy)
    _check_policy(policy, places)
    if policy.logits is not None:
        logits.check_output_layers(model, _stages(model, places))
    for layer, number in dropped_blocks(model, policy).items():
        check_block(layer, number)


def _attach(
    model: torch.nn.Module,
    places: list,
    plans: dict,
    policy: CompressionPolicy,
    predictors: Predictors | None,
    timing: bool,
    allow_training: bool,
) -> None:
    """Gives each sum of a stock model its reducer. plans: by group."""
    phase = Phase()
    predicted_sites = predictors.sites if predictors else {}
    predicted_layers = {layer for layer, _ in predicted_sites}
    for place in places:
        at = policy, place.layer, place.site, place.group, phase
        predictor = predicted_sites.get((place.layer, place.site))
        its_plans = plans[place.group]
        place.attach(Reducer(*at, timing=timing, allow_training=allow_training, plans=its_plans, predictor=predictor))
    if policy.logits is not None:
        _gather_candidates(model, policy.logits, phase, timing)
    dropped = dropped_blocks(model, policy)
    predicted = {layer for layer, number in numbered_layers(model) if number in predicted_layers}
    for layer in model.modules():
        if layer in dropped or layer in predicted or can_overlap(layer):
            compress_layer(layer)
    _note_phases(model, phase)


def _read_predictors(
    model: torch.nn.Module, places: list, policy: CompressionPolicy, allow_training: bool
) -> Predictors:
    """Raises ValueError for a file that cannot be read or is not of this model, or a model whose sums are not
    predicted."""
    try:
        if allow_training:
            raise ValueError("predicted sums are for inference; leave out allow_training=True")
        path, group, config = str(policy.predictor), places[0].group, places[0].module.config
        read = read_predictors(path, group.rank(), group.size(), next(model.parameters()), config.hidden_size)
        if unknown := [layer for layer in read.layers if layer >= config.num_layers]:
            raise ValueError(f"{path} has layer {unknown[0]}; the model has layers 0 to {config.num_layers - 1}")
        for number, site in read.sites:
            has = {place.site for place in places if place.layer == number}  # none of another stage's layer
            if has and site not in has:
                raise ValueError(f"{path} predicts {site} of layer {number}, which has {' and '.join(sorted(has))}")
        for layer, number in numbered_layers(model):
            if number in read.layers and (problem := problem_of(layer)):
                raise ValueError(f"layer {number}: its sums cannot be predicted: {problem}")
    except (OSError, ValueError) as error:
        raise ValueError(f"policy: predictor: {one_line(error)}") from error
    return read


def _refuse_captured_graphs(model: torch.nn.Module) -> None:
    # Megatron's CudaGraphManager is a module of the layer or block whose graphs it keeps.
    if any(getattr(module, "cudagraph_runners", None) for module in model.modules()):
        raise ValueError(
            "CUDA graphs of this model were captured, and replay the sums that they were captured with: compress it "
            "before the inference engine is built, or call Megatron's cuda_graphs.delete_cuda_graphs() first"
        )


def _captures_graphs(places: list) -> bool:
    return any(getattr(place.module.config, "cuda_graph_impl", "none") != "none" for place in places)


def _check_model(model: torch.nn.Module, places: list, policy: CompressionPolicy) -> None:
    kinds = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    if "TEFusedMLP" in kinds:
        raise ValueError("use_te_op_fuser=True fuses the reduction into the MLP: set it to False to compress")
    if not places and policy != CompressionPolicy() and (_stages(model, places) == 1 or any(numbered_layers(model))):
        raise ValueError(
            f"{type(model).__name__} has no row-parallel linear inside a transformer layer: nothing to compress"
        )


def _stages(model: torch.nn.Module, places: list) -> int:
    """The number of pipeline stages that the model is split into. A stage may have no layers, and so no places."""
    config = places[0].module.config if places else getattr(model, "config", None)
    return getattr(config, "pipeline_model_parallel_size", 1)


def _check_policy(policy: CompressionPolicy, places: list) -> None:
    if not places:
        return
    policy.check_layers(max(_number_of_layers(place.module.config) for place in places))
    sites = {place.site for place in places} | _sites_of_other_stages(places[0].module.config)
    said = {f"layers: {key}": of for key, of in policy.layers.items() if isinstance(of, Mapping)}
    for where, codecs in {"sites": policy.sites, **said}.items():
        if absent := [site for site, name in codecs.items() if name != "none" and site not in sites]:
            raise ValueError(f"policy: {where}: the model has no {absent[0]}")
    for place in places:
        place.check(codec_names(policy, place))


def _number_of_layers(config) -> int:
    """Of all pipeline stages, with those that predict further tokens."""
    return config.num_layers + (getattr(config, "mtp_num_layers", None) or 0)


def _sites_of_other_stages(config) -> set[str]:
    """What layers in other pipeline stages may have: a policy is one for all of them."""
    if config.pipeline_model_parallel_size == 1:
        return set()
    experts = {"experts"} if config.num_moe_experts else set()
    shared = {"shared_experts"} if config.moe_shared_expert_intermediate_size else set()
    return {"attention", "mlp"} | experts | shared


def _warn_of_others(model: torch.nn.Module, groups: list) -> None:
    """Names the sums that no policy reaches, on one rank of a tensor-parallel group."""
    if (others := find_not_recognised(model)) and groups and groups[0].rank() == 0:
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


def _note_phases(model: torch.nn.Module, phase: Phase) -> None:
    """Before each forward of the language models in `model`, or else of `model`.

    An engine may call the model inside of a wrapper that was compressed.
    """

    def note_phase(_model, args, kwargs) -> None:
        contexts = [each for each in (*args, *kwargs.values()) if isinstance(each, BaseInferenceContext)]
        phase.name = "decode" if any(context.is_decode_only() for context in contexts) else "prefill"

    for module in [each for each in model.modules() if isinstance(each, LanguageModule)] or [model]:
        module.compression_hook = module.register_forward_pre_hook(note_phase, with_kwargs=True)
