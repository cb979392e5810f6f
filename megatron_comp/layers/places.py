"""Where a Megatron model sums partial results: one `Place` for each sum, whatever class does it.

A place can say what it cannot do (`check`) and take a reduction (`attach`); `restore` gives back the stock one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_layer import TransformerLayer

from . import moe, transformer_engine
from .row_parallel import CompressedRowParallelLinear, check_one_codec, check_reducible
from .site import ReductionSite

Group = torch.distributed.ProcessGroup


@dataclass(frozen=True)
class Place:
    """One sum over ranks. layer: number over the whole model, from 0. site: a policy's word for it."""

    module: torch.nn.Module
    layer: int
    site: str

    @property
    def group(self) -> Group:
        """The ranks that hold the partial sums."""
        raise NotImplementedError

    def check(self, codecs: set[str]) -> None:
        """Raises ValueError if this sum cannot be compressed, or not in these codecs."""
        raise NotImplementedError

    def attach(self, reduction: ReductionSite) -> None:
        """Sum through `reduction` from now on, also where it keeps the stock collective, so that this is counted."""
        raise NotImplementedError


class LinearPlace(Place):
    """A row-parallel linear that reduces its own output."""

    @property
    def group(self) -> Group:
        return self.module.tp_group

    def check(self, codecs: set[str]) -> None:
        if type(self.module) not in (RowParallelLinear, CompressedRowParallelLinear):
            raise ValueError(
                f"{type(self.module).__name__} is a row-parallel linear of a kind that this version cannot compress"
            )
        check_reducible(self.module, codecs)

    def attach(self, reduction: ReductionSite) -> None:
        linear = self.module
        if type(linear) is RowParallelLinear:
            linear.__class__ = CompressedRowParallelLinear
            linear.was_stock = True
        linear.attach(reduction)


class TELinearPlace(Place):
    """The same, of Transformer Engine's."""

    @property
    def group(self) -> Group:
        return self.module._tp_group

    def check(self, codecs: set[str]) -> None:
        if codecs:
            check_one_codec(codecs, self.module.config.sequence_parallel)
            transformer_engine.check_te_linear(self.module)

    def attach(self, reduction: ReductionSite) -> None:
        if reduction.codec_names() or reduction.policy.drops(reduction.layer):
            transformer_engine.attach(self.module, reduction)


class ExpertsPlace(Place):
    """The token dispatcher of a mixture-of-experts layer."""

    @property
    def group(self) -> Group:
        return moe.summing_group(self.module) or self.module.attn_tp_group

    def check(self, codecs: set[str]) -> None:
        if codecs and moe.summing_group(self.module):
            moe.check_experts(self.module, codecs)

    def attach(self, reduction: ReductionSite) -> None:
        if moe.summing_group(self.module):
            moe.sum_experts(self.module, reduction)


class OverlappedSharedExpertsPlace(Place):
    """Shared experts that the dispatcher runs beside its own communication."""

    @property
    def group(self) -> Group:
        return moe.shared_group(self.module)

    def check(self, codecs: set[str]) -> None:
        if codecs and not self._is_known:
            raise ValueError(f"{type(self.module).__name__} are shared experts of a kind that cannot be compressed")
        check_one_codec(codecs, self.module.config.sequence_parallel)

    def attach(self, reduction: ReductionSite) -> None:
        if self._is_known:
            self.module.__class__, self.module.reduction = moe.CompressedSharedExpertMLP, reduction

    @property
    def _is_known(self) -> bool:
        return type(self.module) in (SharedExpertMLP, moe.CompressedSharedExpertMLP)


def find_places(model: torch.nn.Module) -> Iterator[Place]:
    """All sums of partial results inside the layers of a model, in model order."""
    for layer in model.modules():
        if not isinstance(layer, (TransformerLayer, MambaLayer)):
            continue
        number = layer.layer_number - 1
        for name, module in layer.named_modules():
            if isinstance(module, BaseMoELayer):
                yield ExpertsPlace(module, number, "experts")
            elif isinstance(module, SharedExpertMLP) and module.config.moe_shared_expert_overlap:
                yield OverlappedSharedExpertsPlace(module, number, "shared_experts")
            elif transformer_engine.reduces(module):
                yield TELinearPlace(module, number, _site(name))
            elif isinstance(module, RowParallelLinear) and _reduces(module, name):
                yield LinearPlace(module, number, _site(name))


def restore(module: torch.nn.Module) -> None:
    """The stock sum again, if this module has another one; also of compressed linears in a model's spec."""
    if isinstance(module, CompressedRowParallelLinear) and module.reduction is not None:
        module.detach()
        if module.__dict__.pop("was_stock", False):
            del module.reduction
            module.__class__ = RowParallelLinear
    elif transformer_engine.reduces(module):
        transformer_engine.detach(module)
    elif isinstance(module, BaseMoELayer):
        moe.restore_experts(module)
    elif isinstance(module, moe.CompressedSharedExpertMLP):
        del module.reduction
        module.__class__ = SharedExpertMLP


def reductions(model: torch.nn.Module) -> Iterator[ReductionSite]:
    """Those in charge of a model's sums now, in model order."""
    for module in model.modules():
        holder = module.token_dispatcher if isinstance(module, BaseMoELayer) else module
        if isinstance(reduction := getattr(holder, "reduction", None), ReductionSite):
            yield reduction


def _site(name: str) -> str:
    """A policy's word for a linear of this name in its layer. A Mamba mixer has the place of attention."""
    if "shared_experts" in name:
        return "shared_experts"
    return "mlp" if name.startswith("mlp.") else "attention"


def _reduces(linear: RowParallelLinear, name: str) -> bool:
    """Whether the linear reduces its own output: that of experts, and of overlapped shared ones, others add up."""
    return not linear.is_expert and not ("shared_experts" in name and linear.config.moe_shared_expert_overlap)
