# SPDX-License-Identifier: Apache-2.0
"""Where a Megatron model sums partial results: one `Place` for each sum, whatever class does it.

A place can say what it cannot do (`check`) and take a reducer (`attach`); `restore` gives back the stock sum.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.common.vision_module.vision_module import VisionModule
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from . import moe, row_parallel, transformer_engine
from .reducer import Reducer

if TYPE_CHECKING:
    from megatron.core.extensions.transformer_engine import TERowParallelLinear

Group = torch.distributed.ProcessGroup


@dataclass(frozen=True)
class Place:
    """One sum over ranks. layer: its number, as `numbered_layers` tells. site: a policy's word for it."""

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

    def attach(self, reducer: Reducer) -> None:
        """Sum through `reducer` from now on, also where it keeps the stock collective, so that this is counted."""
        raise NotImplementedError

    @property
    def covered(self) -> Iterator[torch.nn.Module]:
        """The modules whose partial sums end up in this sum."""
        return self.module.modules()


class LinearPlace(Place):
    """A row-parallel linear that reduces its own output."""

    module: RowParallelLinear

    @property
    def group(self) -> Group:
        return self.module.tp_group

    def check(self, codecs: set[str]) -> None:
        row_parallel.check_reducible(self.module, codecs)

    def attach(self, reducer: Reducer) -> None:
        row_parallel.attach(self.module, reducer)


class TELinearPlace(Place):
    """The same, of Transformer Engine's."""

    module: "TERowParallelLinear"

    @property
    def group(self) -> Group:
        return self.module._tp_group

    def check(self, codecs: set[str]) -> None:
        if codecs:
            row_parallel.check_one_codec(codecs, self.module.config.sequence_parallel)
            transformer_engine.check_te_linear(self.module)

    def attach(self, reducer: Reducer) -> None:
        if reducer.codecs or reducer.plans.policy.drops(reducer.layer):
            transformer_engine.attach(self.module, reducer)


class ExpertsPlace(Place):
    """The token dispatcher of a mixture-of-experts layer."""

    module: BaseMoELayer

    @property
    def group(self) -> Group:
        return moe.summing_group(self.module) or self.module.attn_tp_group

    def check(self, codecs: set[str]) -> None:
        if codecs and moe.summing_group(self.module):
            moe.check_experts(self.module, codecs)

    def attach(self, reducer: Reducer) -> None:
        if moe.summing_group(self.module):
            moe.sum_experts(self.module, reducer)

    @property
    def covered(self) -> Iterator[torch.nn.Module]:
        yield self.module
        yield from self.module.experts.modules()


class SharedExpertsPlace(Place):
    """Shared experts that sum by themselves and not in their linear.

    Those that the dispatcher runs beside its own communication do, and Megatron's fused ones, which are not known here.
    """

    module: SharedExpertMLP

    @property
    def group(self) -> Group:
        return self.module.tp_group

    def check(self, codecs: set[str]) -> None:
        if codecs and not self._is_known:
            raise ValueError(
                f"{type(self.module).__name__} are shared experts of a kind that cannot be compressed: set "
                "use_grouped_gemm_for_shared_expert=False if Megatron fuses them, or say sites: {shared_experts: none}"
            )
        row_parallel.check_one_codec(codecs, self.module.config.sequence_parallel)

    def attach(self, reducer: Reducer) -> None:
        if self._is_known:
            moe.sum_shared_experts(self.module, reducer)

    @property
    def _is_known(self) -> bool:
        return type(self.module) is SharedExpertMLP


def find_places(model: torch.nn.Module) -> Iterator[Place]:
    """All sums of partial results inside the layers of a model, in model order."""
    for layer, number in numbered_layers(model):
        by_themselves: set[int] = set()  # modules inside of shared experts that sum
        for name, module in layer.named_modules():
            if isinstance(module, BaseMoELayer):
                yield ExpertsPlace(module, number, "experts")
            elif isinstance(module, SharedExpertMLP) and _sums(module):
                by_themselves |= {id(part) for part in module.modules()}
                yield SharedExpertsPlace(module, number, "shared_experts")
            elif id(module) in by_themselves:
                continue
            elif transformer_engine.reduces(module):
                yield TELinearPlace(module, number, _site(name))
            elif isinstance(module, RowParallelLinear) and not module.is_expert:
                yield LinearPlace(module, number, _site(name))


def numbered_layers(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, int]]:
    """The layers of a model, each with its number over all pipeline stages, from 0.

    Layers that predict further tokens (MTP) come after those of the decoder: all of the first depth have the number
    that the decoder has layers. A vision tower beside a language model is left out: it has numbers of its own.
    """
    depths = {
        id(part): mtp.config.num_layers + mtp.layer_number - 1
        for mtp in model.modules()
        if isinstance(mtp, MultiTokenPredictionLayer)
        for part in mtp.modules()
    }
    for module in _own_modules(model):
        if isinstance(module, (TransformerLayer, MambaLayer)):
            yield module, depths.get(id(module), module.layer_number - 1)


def _own_modules(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules of a model but for vision towers beside a language model."""
    beside: set[int] = set()
    if any(isinstance(module, LanguageModule) for module in model.modules()):
        towers = (module for module in model.modules() if isinstance(module, VisionModule))
        beside = {id(part) for tower in towers for part in tower.modules()}
    return (module for module in model.modules() if id(module) not in beside)


def restore(module: torch.nn.Module) -> None:
    """The stock sum again, if this module has another one; also of compressed linears in a model's spec."""
    if isinstance(module, BaseMoELayer):
        moe.restore_experts(module)
    elif isinstance(module, SharedExpertMLP):
        moe.restore_shared_experts(module)
    elif "reducer" in module.__dict__:
        kind = transformer_engine if transformer_engine.reduces(module) else row_parallel
        kind.detach(module)


def reducers(model: torch.nn.Module) -> Iterator[Reducer]:
    """Those in charge of a model's sums now, in model order."""
    for module in _own_modules(model):
        holder = moe.summing_dispatcher(module) if isinstance(module, BaseMoELayer) else module
        if isinstance(reducer := getattr(holder, "reducer", None), Reducer):
            yield reducer


def _site(name: str) -> str:
    """A policy's word for a linear of this name in its layer. A Mamba mixer has the place of attention."""
    if "shared_experts" in name:
        return "shared_experts"
    return "mlp" if name.startswith("mlp.") else "attention"


def _sums(shared: SharedExpertMLP) -> bool:
    """Whether shared experts sum by themselves; otherwise their linear does."""
    return shared.config.moe_shared_expert_overlap or type(shared).forward is not SharedExpertMLP.forward
