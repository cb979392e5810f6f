"""Turning compression on and off in a built Megatron model, and reading what it did."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.tensor_parallel import RowParallelLinear

from ..policy import CompressionPolicy
from ..version import __version__
from .places import find_places, reductions, restore
from .site import Phase, ReductionSite, SiteStats, Traffic

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

    Weights, state dict and modules stay where they are: row-parallel linears change their class. A model that is
    compressed already takes the new policy, and its counters start again. Every rank must call it.

    Prefill and decode are told apart by the inference context that this very module is called with.

    timing: `stats` tells seconds too; every reduction then waits for the device.
    allow_training: let gradients pass compressed reductions in training mode.

    Raises ValueError, before anything is changed, where the policy asks for what this model does not have or cannot do,
    and on every rank if policies or package versions differ between ranks.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"apply_compression takes one module, not {type(model).__name__}; call it for each model chunk")
    if not isinstance(policy, CompressionPolicy):
        raise TypeError(f"apply_compression takes a CompressionPolicy, such as CompressionPolicy(codec={policy!r})")
    places = list(find_places(model))
    _compare_ranks(places, policy, _problem(model, places, policy))
    remove_compression(model)

    phase = Phase()
    for place in places:
        place.attach(ReductionSite(policy, place.layer, place.site, phase, timing, allow_training))
    model.compression_hook = model.register_forward_pre_hook(_phase_hook(phase), with_kwargs=True)
    logger.info("megatron_comp: %d reductions of %s under policy %s", len(places), type(model).__name__, policy)
    return model


def remove_compression(model: torch.nn.Module) -> torch.nn.Module:
    """Every reduction of the model is the stock one again, those of compressed linears in its spec included.

    A model that is not compressed stays as it is. Returns the model.
    """
    for module in model.modules():
        restore(module)
        if hook := module.__dict__.pop("compression_hook", None):
            hook.remove()
    return model


def stats(model: torch.nn.Module) -> ModelStats:
    """Calls and bytes of every site, compressed and kept, since `apply_compression`."""
    return ModelStats([reduction.stats for reduction in reductions(model)])


def _problem(model: torch.nn.Module, places: list, policy: CompressionPolicy) -> str | None:
    """Why this model cannot do what the policy asks; None if it can."""
    try:
        _check_model(model, places)
        _check_policy(policy, places)
    except ValueError as error:
        return str(error)
    return None


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
    policy.check_layers(places[0].module.config.num_layers)
    sites = {place.site for place in places}
    said = {f"layers: {key}": of for key, of in policy.layers.items() if isinstance(of, Mapping)}
    for where, codecs in {"sites": policy.sites, **said}.items():
        if absent := [site for site, name in codecs.items() if name != "none" and site not in sites]:
            raise ValueError(f"policy: {where}: the model has no {absent[0]}")
    for place in places:
        place.check(ReductionSite(policy, place.layer, place.site).codec_names())


def _compare_ranks(places: list, policy: CompressionPolicy, problem: str | None) -> None:
    """Raises on every rank if one of them found a problem, or if they do not all have one policy and version."""
    said, heard = (__version__, policy.digest(), str(policy), problem), []
    # Every gather comes before any error, or other groups would wait for the ranks that left.
    for group in dict.fromkeys(place.group for place in places):
        everyone = [said] * group.size()
        if group.size() > 1:
            dist.all_gather_object(everyone, said, group=group)
        heard.append(everyone)
    if problem:
        raise ValueError(problem)
    for everyone in heard:
        for rank, (*what, its_problem) in enumerate(everyone):
            if its_problem:
                raise ValueError(f"rank {rank}: {its_problem}")
            if what[:2] != list(everyone[0][:2]):
                raise ValueError(
                    "compression differs between tensor-parallel ranks: "
                    + "; ".join(f"rank {r}: version {everyone[r][0]}, policy {everyone[r][2]}" for r in (0, rank))
                )


def _phase_hook(phase: Phase):
    def note_phase(_model, args, kwargs) -> None:
        contexts = [each for each in (*args, *kwargs.values()) if isinstance(each, BaseInferenceContext)]
        phase.name = "decode" if any(context.is_decode_only() for context in contexts) else "prefill"

    return note_phase
