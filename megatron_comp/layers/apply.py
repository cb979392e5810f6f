"""Turning compression on and off in a built Megatron model, and reading what it did."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from ..policy import CompressionPolicy
from ..version import __version__
from .row_parallel import CompressedRowParallelLinear, check_reducible
from .site import Phase, ReductionSite, SiteStats, Traffic

logger = logging.getLogger(__name__)

EXPERT_SITES = ("experts", "shared_experts")


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
    places = list(_row_parallel_linears(model))
    _compare_ranks(places, policy, _problem(model, places, policy))
    remove_compression(model)

    phase = Phase()
    for linear, layer, site in places:
        if type(linear) is RowParallelLinear:
            linear.__class__ = CompressedRowParallelLinear
            linear.was_stock = True
        linear.attach(ReductionSite(policy, layer, site, phase, timing, allow_training))
    model.compression_hook = model.register_forward_pre_hook(_phase_hook(phase), with_kwargs=True)
    logger.info("megatron_comp: %d reductions of %s under policy %s", len(places), type(model).__name__, policy)
    return model


def remove_compression(model: torch.nn.Module) -> torch.nn.Module:
    """Every reduction of the model is the stock one again, those of compressed linears in its spec included.

    A model that is not compressed stays as it is. Returns the model.
    """
    for module in model.modules():
        if isinstance(module, CompressedRowParallelLinear) and module.reduction is not None:
            module.detach()
            if module.__dict__.pop("was_stock", False):
                del module.reduction
                module.__class__ = RowParallelLinear
        if hook := module.__dict__.pop("compression_hook", None):
            hook.remove()
    return model


def stats(model: torch.nn.Module) -> ModelStats:
    """Calls and bytes of every site, compressed and kept, since `apply_compression`."""
    return ModelStats([linear.reduction.stats for linear in _compressed(model)])


def _compressed(model: torch.nn.Module) -> Iterator[CompressedRowParallelLinear]:
    for module in model.modules():
        if isinstance(module, CompressedRowParallelLinear) and module.reduction is not None:
            yield module


def _row_parallel_linears(model: torch.nn.Module) -> Iterator[tuple[RowParallelLinear, int, str]]:
    """(linear, layer from 0, site) of every row-parallel linear that reduces its own output, in model order."""
    for layer in model.modules():
        if not isinstance(layer, TransformerLayer):
            continue
        for name, module in layer.named_modules():
            if isinstance(module, RowParallelLinear) and not _of_experts(name, module):
                yield module, layer.layer_number - 1, "mlp" if name.startswith("mlp.") else "attention"


def _of_experts(name: str, linear: RowParallelLinear) -> bool:
    return linear.is_expert or "shared_experts" in name


def _problem(model: torch.nn.Module, places: list, policy: CompressionPolicy) -> str | None:
    """Why this model cannot do what the policy asks; None if it can."""
    try:
        _check_model(model, places)
        _check_policy(policy, model, places)
    except ValueError as error:
        return str(error)
    return None


def _check_model(model: torch.nn.Module, places: list) -> None:
    kinds = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    if "TERowParallelLinear" in kinds:
        raise ValueError(
            "the model has Transformer Engine linears, which this version cannot compress; build it with the local spec"
        )
    if not places:
        raise ValueError(
            f"{type(model).__name__} has no row-parallel linear inside a transformer layer: nothing to compress"
        )
    inside = {id(linear) for linear, _, _ in places}
    for name, module in model.named_modules():
        if isinstance(module, RowParallelLinear) and id(module) not in inside and not _of_experts(name, module):
            raise ValueError(f"{name} is a row-parallel linear outside of transformer layers, which no policy names")
    for linear, _, _ in places:
        if type(linear) not in (RowParallelLinear, CompressedRowParallelLinear):
            raise ValueError(
                f"{type(linear).__name__} is a row-parallel linear of a kind that this version cannot compress"
            )


def _check_policy(policy: CompressionPolicy, model: torch.nn.Module, places: list) -> None:
    policy.check_layers(places[0][0].config.num_layers)
    with_experts = [m.layer_number - 1 for m in model.modules() if isinstance(m, BaseMoELayer)]
    sites = {site for _, _, site in places} | set(EXPERT_SITES if with_experts else ())
    said = {f"layers: {key}": of for key, of in policy.layers.items() if isinstance(of, Mapping)}
    for where, codecs in {"sites": policy.sites, **said}.items():
        if absent := [site for site, name in codecs.items() if name != "none" and site not in sites]:
            raise ValueError(f"policy: {where}: the model has no {absent[0]}")
    for layer in with_experts:
        if any(ReductionSite(policy, layer, site).codec_names() for site in EXPERT_SITES):
            raise ValueError(
                f"policy: this version does not compress experts, as layer {layer} has: say "
                "sites: {experts: none, shared_experts: none}, and name sites where layers has codecs"
            )
    for linear, layer, site in places:
        check_reducible(linear, ReductionSite(policy, layer, site).codec_names())


def _compare_ranks(places: list, policy: CompressionPolicy, problem: str | None) -> None:
    """Raises on every rank if one of them found a problem, or if they do not all have one policy and version."""
    said = (__version__, policy.digest(), str(policy), problem)
    everyone = [said]
    group = places[0][0].tp_group if places else None
    if group is not None and group.size() > 1:
        everyone = [None] * group.size()
        dist.all_gather_object(everyone, said, group=group)
    for rank, (_, _, _, its_problem) in enumerate(everyone):
        if its_problem:
            raise ValueError(its_problem if its_problem == problem else f"rank {rank}: {its_problem}")
    for rank, other in enumerate(everyone):
        if other[:2] != everyone[0][:2]:
            raise ValueError(
                "compression differs between tensor-parallel ranks: "
                + "; ".join(f"rank {r}: version {everyone[r][0]}, policy {everyone[r][2]}" for r in (0, rank))
            )


def _phase_hook(phase: Phase):
    def note_phase(_model, args, kwargs) -> None:
        contexts = [each for each in (*args, *kwargs.values()) if isinstance(each, BaseInferenceContext)]
        phase.name = "decode" if any(context.is_decode_only() for context in contexts) else "prefill"

    return note_phase
