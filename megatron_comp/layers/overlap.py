"""Transformer layers that compute the MLP of some tokens while the sums of others are on the wire (prefill).

All that follows attention in a layer treats every token alone. So its rows go in parts, through both sums:

    attention's projection  | part 0 | part 1 | part 2 |                                  sent as soon as it is computed
    its sums, on the wire            | part 0 | part 1 | part 2 |
    norm and MLP                              | part 0 | part 1 | part 2 |                as soon as its sum is there
    the MLP's sums, on the wire                        | part 0 | part 1 | part 2 |

The layer waits for a part of each sum, not for both of them. What travels is what travels in one piece, to the byte;
products of fewer rows may round otherwise where a BLAS chooses the order of its additions by shape.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer

from ..wire import exchange
from ..wire.collectives import PendingAllReduce
from .row_parallel import CompressedRowParallelLinear
from .site import ReductionSite, Traffic

# Options of Megatron's config, and what they must be for its layer to do one thing after the other, as is needed here.
PLAIN = {"mlp_chunks_for_prefill": 1, "inference_fuse_tp_communication": False, "fp32_residual_connection": False}


@dataclass(slots=True)
class OverlappedSum(ReductionSite):
    """A sum that its layer may begin in one place and end in another, part by part.

    Between the two its value is zero, to which Megatron adds the residual; the layer adds each part as it arrives.
    """

    overlaps: bool = False
    """Whether the layer may compute in parts of its rows."""
    defers: bool = False
    """Whether a sum in parts is left for the layer to end."""
    pending: PendingAllReduce | None = None
    traffic: Traffic | None = None

    @property
    def takes_parts(self) -> bool:
        return self.pending is None  # what it is given then is a part

    def begin(self, out: torch.Tensor, group: torch.distributed.ProcessGroup) -> None:
        """From now on `reduce` takes the parts of a sum into `out`, and returns zeros; until `arriving`."""
        self.pending, self.traffic = self._begin(out, group)

    def reduce(self, partial: torch.Tensor, group: torch.distributed.ProcessGroup, training: bool) -> torch.Tensor:
        if self.pending is None:
            return ReductionSite.reduce(self, partial, group, training)
        self._push(partial, self.pending, self.traffic)
        return torch.zeros_like(partial)

    def _end(self, pending: PendingAllReduce, out: torch.Tensor, traffic: Traffic) -> torch.Tensor:
        if not self.defers:
            return ReductionSite._end(self, pending, out, traffic)
        self.pending, self.traffic = pending, traffic
        return torch.zeros_like(out)

    def arriving(self) -> Iterator[torch.Tensor]:
        """The sums of what was begun, `[rows, hidden]` of one part after the other, each when it is there."""
        pending, self.pending = self.pending, None
        while pending and (part := self._timed(self.traffic, pending.take)) is not None:
            yield part


class OverlappedLayer(TransformerLayer):
    """Megatron's layer, whose MLP overlaps with sums that go in parts; parameters and arguments are the stock class's.

    `apply_compression` turns layers into it that `can_overlap`, see `overlap`.
    """

    def _forward_attention(self, *args, **kwargs):
        sums = getattr(self.self_attention.linear_proj, "reduction", None)
        if not self._may_overlap() or not isinstance(sums, OverlappedSum):
            return super()._forward_attention(*args, **kwargs)
        sums.defers = True
        try:
            return super()._forward_attention(*args, **kwargs)
        except BaseException:
            sums.pending = None
            raise
        finally:
            sums.defers = False

    def _forward_mlp(self, hidden_states, *args, **kwargs):
        """hidden_states: `[sequence, batch, hidden]`, without attention's sum where that is pending."""
        attention, fc2 = getattr(self.self_attention.linear_proj, "reduction", None), self.mlp.linear_fc2
        may_overlap = self._may_overlap()
        if not may_overlap and getattr(attention, "pending", None) is None:
            return super()._forward_mlp(hidden_states, *args, **kwargs)
        hidden = hidden_states.reshape(-1, 1, hidden_states.shape[-1])
        rows = fc2.part_rows(hidden) if may_overlap else [len(hidden)]
        completed = _completed(hidden, attention)
        try:
            if len(rows) == 1:
                for _ in completed:
                    pass
                return super()._forward_mlp(hidden.view(hidden_states.shape), *args, **kwargs)
            fc2.reduction.begin(out := torch.empty_like(hidden), self.tp_group)
            outputs, start, there = [], 0, 0
            for part in hidden.split(rows):
                start += len(part)
                while there < start:
                    there = next(completed)
                outputs.append(super()._forward_mlp(part, *args, **kwargs))
            for output, its_sum in zip(outputs, fc2.reduction.arriving(), strict=True):
                its_sum += output.view(its_sum.shape)
            return out.view(hidden_states.shape)
        finally:  # also of an error, or the next forward would go on with these sums
            for sums in (attention, fc2.reduction):
                if isinstance(sums, OverlappedSum):
                    sums.pending = None

    def _may_overlap(self) -> bool:
        """Not for decoded tokens, nor where somebody looks at what is still without its sum, or in parts."""
        sums = getattr(self.mlp.linear_fc2, "reduction", None)
        if not isinstance(sums, OverlappedSum) or not sums.overlaps or sums.phase.name == "decode" or self.training:
            return False
        return not any(module._forward_hooks or module._forward_pre_hooks for module in _inside(self))


def can_overlap(layer: torch.nn.Module) -> bool:
    """Whether its MLP can begin before attention's sum is complete, it has sums of ours, and its device gains by it."""
    if not isinstance(layer, TransformerLayer) or type(layer.mlp) is not MLP or layer.tp_group.size() == 1:
        return False
    if type(layer.self_attention) not in (SelfAttention, MLASelfAttention):
        return False
    linears = layer.self_attention.linear_proj, layer.mlp.linear_fc2
    sums = getattr(layer.mlp.linear_fc2, "reduction", None)
    if not isinstance(sums, ReductionSite) or not sums.codec_names():
        return False
    return (
        exchange.overlap_bytes(layer.mlp.linear_fc2.weight.device.type) is not None
        and isinstance(layer.cross_attention, IdentityOp)
        and all(getattr(layer.config, option, wanted) == wanted for option, wanted in PLAIN.items())
        and all(type(linear) is CompressedRowParallelLinear for linear in linears)
        # A bias would be added before the sum, in another order than Megatron's.
        and all(linear.bias is None and not linear.sequence_parallel for linear in linears)
    )


def overlap(layer: TransformerLayer) -> None:
    """From now on its sums overlap with its MLP where they go in parts. `end_overlap` undoes it."""
    linears = layer.self_attention.linear_proj, layer.mlp.linear_fc2
    for linear in linears:
        if type(linear.reduction) is ReductionSite:
            linear.reduction = linear.reduction.turned(OverlappedSum)
    layer.mlp.linear_fc2.reduction.overlaps = True
    if type(layer) is TransformerLayer:
        layer.__class__ = OverlappedLayer


def end_overlap(layer: OverlappedLayer) -> None:
    """The stock layer again. Its linears are restored by whoever restores linears."""
    layer.__class__ = TransformerLayer


def _completed(hidden: torch.Tensor, attention: ReductionSite) -> Iterator[int]:
    """Adds attention's sums to the rows of `[rows, 1, hidden]` as they arrive; yields how many rows have theirs."""
    end = 0
    for each in attention.arriving() if isinstance(attention, OverlappedSum) else ():
        end += len(each)
        hidden[end - len(each) : end, 0] += each
        yield end
    yield len(hidden)


def _inside(layer: torch.nn.Module) -> Iterator[torch.nn.Module]:
    return (module for module in layer.modules() if module is not layer)
