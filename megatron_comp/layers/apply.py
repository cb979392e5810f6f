"""Turning compression on and off in a built Megatron model, and reading what it did."""

import itertools
import logging
import os
import socket
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import BaseInferenceContext

from ..policy import PHASES, CompressionPolicy
from ..version import __version__
from ..wire.backends import warm_up
from ..wire.codec import parse_codec
from ..wire.cost import FLAT, step_codecs
from ..wire.figures import ASSUMED, ASSUMED_PEERS, VARIABLE, Figures, find_figures
from ..wire.topology import connect
from . import logits
from .compressed_layer import can_overlap, compress_layer, restore_layer
from .meter import SiteStats, Traffic
from .not_recognised import find_not_recognised, shortened
from .places import Place, find_places, reducers, restore
from .plans import Plans
from .reducer import Phase, Reducer
from .sync_drop import check_block, dropped_blocks

logger = logging.getLogger(__name__)
_said: set[str] = set()


@dataclass(slots=True)
class ModelStats:
    """What every compressed site of a model did since `apply_compression`, on this rank. `print` shows it in a line."""

    sites: list[SiteStats]
    link: str = ""
    """What predictions went by: the calibration file, or what is assumed of the link. Empty where nothing predicts."""
    not_recognised: list[str] = field(default_factory=list)
    """Modules of the model, with their classes, that have a sum which no policy reaches: it stays uncompressed, and is
    not counted here."""

    def __str__(self) -> str:
        said = f"{self.compressed.calls:,} sums compressed"
        if self.compressed.calls:
            said += f" ({_counts(self.algorithms)})"
        said += f", {self.kept.calls:,} uncompressed"
        if self.kept.calls:
            said += f" ({_counts(self.kept_because)})"
        said += f", {self.bits_per_value:.2f} bits per value, {self.received_bytes:,} bytes received"
        if self.captured:
            said += ", not counting replays of CUDA graphs"
        if self.not_recognised:
            said += f"; {len(self.not_recognised)} sums of the model are not recognised and not counted"
        return said + (f"; {self.link}" if self.link else "")

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


def _counts(counter: Counter) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counter.most_common())


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
    policy = CompressionPolicy.of(policy)
    places = list(find_places(model))
    hosts = _compare_ranks(places, policy, _problem(model, places, policy))
    figures = _agree_on_figures({group: len(set(names)) for group, names in hosts.items()}, policy)
    topologies = _connect(hosts, policy)
    _compile_kernels(model, places, policy, topologies)
    remove_compression(model)
    _warn_of_others(model, places)

    phase = Phase()
    plans = {group: Plans(policy, known, topologies.get(group)) for group, known in figures.items()}
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
    found = list(reducers(model))
    links = dict.fromkeys(each.plans.figures.source for each in found if each.plans.policy.predicts)
    sites = [deepcopy(each.meter.stats) for each in (*found, *logits.gathers(model))]
    return ModelStats(sites, "; ".join(links), find_not_recognised(model))


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
    """Of the codecs that a place compresses in, in one phase or another."""
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
        _say_once(
            logging.WARNING,
            f"{len(others)} sums of {type(model).__name__} are not recognised and stay uncompressed: "
            f"{shortened(others)}. A policy reaches the layers of one language model; for a vision tower call "
            "apply_compression on the tower, too",
        )


def _gather_candidates(model: torch.nn.Module, count: int, phase: Phase, timing: bool) -> None:
    for layer, vocabulary in logits.output_layers(model):
        logits.attach(layer, logits.LogitsGather(count, vocabulary, layer.tp_group, phase, timing))
    _say_once(
        logging.WARNING,
        f"logits: decoded tokens come from {count} candidates of each rank: for greedy decoding, and top-k sampling "
        f"with k <= {count}. Log-probabilities and top-p sampling would be wrong",
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


def _compare_ranks(places: list, policy: CompressionPolicy, problem: str | None) -> dict:
    """By group, the names of its ranks' machines.

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
    return {group: [host for *_, host in everyone] for group, everyone in heard.items()}


def _connect(hosts: dict, policy: CompressionPolicy) -> dict:
    """By group, which of its ranks are near one another; none where no sum asks."""
    if not policy.has_levels:
        return {}
    return connect({group: policy.islands_of(names) for group, names in hosts.items() if group.size() > 1})


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
        _say_once(
            level,
            f"nothing was measured of the link between these {ranks} ranks; {figures.source}. "
            "`megatron-comp calibrate` measures it",
        )
        return
    _say_once(logging.INFO, f"sums over {ranks} ranks are predicted from {figures.source}")
    if unknown := [str(codec) for codec in policy.codecs() if not figures.knows(codec)]:
        _say_once(
            logging.WARNING,
            f"{figures.source} has no time of {', '.join(unknown)}, taken to be as slow as the slowest there; "
            "`megatron-comp calibrate` measures codecs of --policy or --codec",
        )


def _say_once(level: int, text: str) -> None:
    """Once per process, however many models and policies it holds for."""
    if text not in _said:
        _said.add(text)
        logger.log(level, "megatron_comp: %s", text)


def _phase_hook(phase: Phase):
    def note_phase(_model, args, kwargs) -> None:
        contexts = [each for each in (*args, *kwargs.values()) if isinstance(each, BaseInferenceContext)]
        phase.name = "decode" if any(context.is_decode_only() for context in contexts) else "prefill"

    return note_phase
