"""Turning compression on and off in a built Megatron model, and reading what it did."""

import itertools
import logging
import os
import socket
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.tensor_parallel import RowParallelLinear

from ..policy import PHASES, CompressionPolicy
from ..version import __version__
from ..wire.backends import warm_up
from ..wire.codec import parse_codec
from ..wire.cost import ALGORITHMS, step_codecs
from ..wire.figures import ASSUMED, ASSUMED_PEERS, VARIABLE, Figures, find_figures
from . import logits
from .compressed_layer import can_overlap, compress_layer, restore_layer
from .meter import SiteStats, Traffic
from .places import Place, find_places, reducers, restore
from .plans import Plans
from .reducer import Phase, Reducer
from .sync_drop import check_block, dropped_blocks

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class ModelStats:
    """What every compressed site of a model did since `apply_compression`, on this rank."""

    sites: list[SiteStats]

    @property
    def compressed(self) -> Traffic:
        return sum((site.compressed for site in self.sites), Traffic())

    @property
    def kept(self) -> Traffic:
        return sum((site.kept for site in self.sites), Traffic())

    @property
    def kept_because(self) -> Counter:
        return sum((site.kept_because for site in self.sites), Counter())

    @property
    def algorithms(self) -> Counter:
        return sum((site.algorithms for site in self.sites), Counter())

    @property
    def captured(self) -> int:
        """Calls that were recorded into CUDA graphs. Where it is not 0, replays are missing from all figures here."""
        return sum(site.captured for site in self.sites)

    @property
    def received_bytes(self) -> int:
        return self.compressed.received_bytes + self.kept.received_bytes

    @property
    def bits_per_value(self) -> float:
        """Bits that a value of a summed tensor took on the way, over compressed and kept messages."""
        total = self.compressed + self.kept
        return 8 * total.message_bytes / total.values if total.values else 0.0


def apply_compression(
    model: torch.nn.Module, policy: CompressionPolicy, *, timing: bool = False, allow_training: bool = False
) -> torch.nn.Module:
    """Compresses the tensor-parallel reductions of a built Megatron model as `policy` says; returns the model.

    Weights, state dict and modules stay what they are, with their classes. A model that is compressed already takes the
    new policy, and its counters start again. Every rank must call it.

    Prefill and decode are told apart by the inference context that this very module is called with.

    `min_bytes: auto` and `algorithm: auto` go by what rank 0 of each group finds and all its ranks take: the file that
    MEGATRON_COMP_CALIBRATION names (`assumed`: none), else the one that `megatron-comp calibrate` left for such a
    group, else an assumed link. Which it was is logged.

    timing: `stats` tells seconds too; every reduction then waits for the device.
    allow_training: let gradients pass compressed reductions in training mode.

    Raises ValueError, before anything is changed, where the policy asks for what this model does not have or cannot do,
    if a calibration file is none or of another number of ranks, and on every rank if policies or package versions
    differ between ranks.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"apply_compression takes one module, not {type(model).__name__}; call it for each model chunk")
    if not isinstance(policy, CompressionPolicy):
        raise TypeError(f"apply_compression takes a CompressionPolicy, such as CompressionPolicy(codec={policy!r})")
    places = list(find_places(model))
    hosts = _compare_ranks(places, policy, _problem(model, places, policy))
    figures = _agree_on_figures(hosts, policy)
    _compile_kernels(model, places, policy)
    remove_compression(model)

    phase, plans = Phase(), {group: Plans(policy, its_figures) for group, its_figures in figures.items()}
    for place in places:
        how = {"timing": timing, "allow_training": allow_training, "plans": plans[place.group]}
        place.attach(Reducer(policy, place.layer, place.site, place.group, phase, **how))
    if policy.logits is not None:
        _gather_candidates(model, policy.logits, phase, timing)
    dropped = dropped_blocks(model, policy)
    for layer in model.modules():
        if layer in dropped or can_overlap(layer):
            compress_layer(layer)
    model.compression_hook = model.register_forward_pre_hook(_phase_hook(phase), with_kwargs=True)
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
    return ModelStats([deepcopy(each.meter.stats) for each in (*reducers(model), *logits.gathers(model))])


def _problem(model: torch.nn.Module, places: list, policy: CompressionPolicy) -> str | None:
    """Why this model cannot do what the policy asks; None if it can."""
    try:
        _refuse_captured_graphs(model)
        _check_model(model, places)
        _check_policy(policy, places)
        if policy.logits is not None:
            logits.check_output_layers(model, places[0].module.config)
        for layer in dropped_blocks(model, policy):
            check_block(layer)
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
    inside = {id(module) for place in places for module in place.module.modules()}
    for name, module in model.named_modules():
        if isinstance(module, RowParallelLinear) and id(module) not in inside and not module.is_expert:
            raise ValueError(f"{name} is a row-parallel linear outside of transformer layers, which no policy names")


def _check_policy(policy: CompressionPolicy, places: list) -> None:
    policy.check_layers(max(place.module.config.num_layers for place in places))
    sites = {place.site for place in places} | _sites_of_other_stages(places[0].module.config)
    said = {f"layers: {key}": of for key, of in policy.layers.items() if isinstance(of, Mapping)}
    for where, codecs in {"sites": policy.sites, **said}.items():
        if absent := [site for site, name in codecs.items() if name != "none" and site not in sites]:
            raise ValueError(f"policy: {where}: the model has no {absent[0]}")
    for place in places:
        place.check(_codec_names(policy, place))


def _codec_names(policy: CompressionPolicy, place: Place) -> set[str]:
    """Of the codecs that a place compresses in, in one phase or another."""
    return {policy.codec_name(place.layer, place.site, phase) for phase in PHASES} - {"none"}


def _sites_of_other_stages(config) -> set[str]:
    """What layers in other pipeline stages may have: a policy is one for all of them."""
    if config.pipeline_model_parallel_size == 1:
        return set()
    experts = {"experts"} if config.num_moe_experts else set()
    shared = {"shared_experts"} if config.moe_shared_expert_intermediate_size else set()
    return {"attention", "mlp"} | experts | shared


def _gather_candidates(model: torch.nn.Module, count: int, phase: Phase, timing: bool) -> None:
    for layer, vocabulary in logits.output_layers(model):
        logits.attach(layer, logits.LogitsGather(count, vocabulary, layer.tp_group, phase, timing))
        if layer.tp_group.rank() == 0:
            logger.warning(
                "megatron_comp: logits: %d candidates of each rank are for greedy decoding, and top-k sampling with "
                "k <= %d. Log-probabilities and top-p sampling would be wrong",
                count,
                count,
            )


def _compile_kernels(model: torch.nn.Module, places: list, policy: CompressionPolicy) -> None:
    """Kernels of a GPU are compiled here, not in the first request; raises RuntimeError if that cannot be done."""
    parameter = next(model.parameters())
    sums = set()
    for place in places if parameter.is_cuda else []:
        config, names = place.module.config, _codec_names(policy, place)
        scatters, chosen = config.sequence_parallel, policy.algorithm
        algorithms = ("reduce_scatter",) if scatters else ALGORITHMS[1:] if chosen == "auto" else (chosen,)
        sums |= set(itertools.product(names, algorithms, [config.hidden_size], [place.group.size()]))
    for name, algorithm, hidden, ranks in sorted(sums):
        if ranks > 1 and not (">" in name and algorithm == "gather_sum"):
            first, second = step_codecs(parse_codec(name))
            warm_up(first.format, second.format, parameter.dtype, hidden, ranks, algorithm, parameter.device)


def _compare_ranks(places: list, policy: CompressionPolicy, problem: str | None) -> dict:
    """By group, how many machines its ranks are on.

    Raises on every rank if one of them found a problem, or if they do not all have one policy and version.
    """
    said, heard = (__version__, policy.digest(), str(policy), problem, socket.gethostname()), {}
    # Every gather comes before any error, or other groups would wait for the ranks that left.
    for group in dict.fromkeys(place.group for place in places):
        everyone = [said] * group.size()
        if group.size() > 1:
            dist.all_gather_object(everyone, said, group=group)
        heard[group] = everyone
    if problem:
        raise ValueError(problem)
    for everyone in heard.values():
        for rank, (*what, its_problem, _) in enumerate(everyone):
            if its_problem:
                raise ValueError(f"rank {rank}: {its_problem}")
            if what[:2] != list(everyone[0][:2]):
                raise ValueError(
                    "compression differs between tensor-parallel ranks: "
                    + "; ".join(f"rank {r}: version {everyone[r][0]}, policy {everyone[r][2]}" for r in (0, rank))
                )
    return {group: len({host for *_, host in everyone}) for group, everyone in heard.items()}


def _agree_on_figures(hosts: dict, policy: CompressionPolicy) -> dict:
    """By group, rank 0's figures; what it failed with is raised on every rank of the group."""
    agreed = {}
    for group, machines in hosts.items():
        found: list[Figures | str] = [ASSUMED]
        if group.size() > 1 and policy.predicts:
            if group.rank() == 0:
                device = "cuda" if torch.cuda.is_available() else "cpu"
                try:
                    found[0] = find_figures(group.size(), machines, dist.get_backend(group), device)
                    if found[0] is ASSUMED and device == "cuda" and machines == 1 and _reach_one_another(group.size()):
                        found[0] = ASSUMED_PEERS
                except (ValueError, OSError) as error:
                    found[0] = str(error)
            dist.broadcast_object_list(found, dist.get_global_rank(group, 0), group=group)
        agreed[group] = found[0]
    # After the last broadcast, or other groups would wait for the ranks that left.
    for group, figures in agreed.items():
        if isinstance(figures, str):
            raise ValueError(figures)
        if group.size() > 1 and policy.predicts and group.rank() == 0:
            _say_figures(figures, policy, group.size())
    return agreed


def _reach_one_another(ranks: int) -> bool:
    """Whether so many GPUs are seen here that have access to one another's memory."""
    if torch.cuda.device_count() < ranks:
        return False
    return all(torch.cuda.can_device_access_peer(0, other) for other in range(1, ranks))


def _say_figures(figures: Figures, policy: CompressionPolicy, ranks: int) -> None:
    if not figures.measured:
        level = logging.INFO if os.environ.get(VARIABLE) == "assumed" else logging.WARNING
        logger.log(
            level,
            "megatron_comp: nothing was measured of the link between these %d ranks; %s. "
            "`megatron-comp calibrate` measures it",
            ranks,
            figures.source,
        )
        return
    logger.info("megatron_comp: sums over %d ranks are predicted from figures %s", ranks, figures.source)
    if unknown := [str(codec) for codec in policy.codecs() if not figures.knows(codec)]:
        logger.warning(
            "megatron_comp: %s has no time of %s, taken to be as slow as the slowest there; "
            "`megatron-comp calibrate` measures codecs of --policy or --codec",
            figures.source,
            ", ".join(unknown),
        )


def _phase_hook(phase: Phase):
    def note_phase(_model, args, kwargs) -> None:
        contexts = [each for each in (*args, *kwargs.values()) if isinstance(each, BaseInferenceContext)]
        phase.name = "decode" if any(context.is_decode_only() for context in contexts) else "prefill"

    return note_phase
