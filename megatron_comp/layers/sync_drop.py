"""Transformer blocks that do without the sum over ranks after attention (SPD, arXiv 2502.20727).

With X the block's input `[sequence, batch, hidden]`, equal on all ranks, b and b2 the biases of attention's and of the
MLP's output projection, and Y_i and Z_i rank i's partial sums of them, before their biases:

    stock      h = X + b + sum_i Y_i          Z_i = MLP_i(norm(h))                  out = h + b2 + sum_i Z_i
    dropped    h_i = X + b + Y_i              Z_i = MLP_i(norm(h_i))                out = X + b + b2 + sum_i (Y_i + Z_i)

One sum instead of two, of a message of the same shape, compressed or not as the policy says of the layer's MLP. The
residual X never travels. The output differs from the stock one only by what the MLP sees.

What ranks may differ in: Y_i, h_i, Z_i, and everything between them inside of the block. What they may not: X, and so
all queries, keys and values that are computed from it and stay in a cache; and the output, which is made of X, biases
and a sum that has the same bits on every rank. Nothing that is kept beyond the block depends on h_i.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from ..policy import DROP, CompressionPolicy
from . import transformer_engine
from .overlap import OverlappedLayer, OverlappedSum
from .places import find_places
from .row_parallel import CompressedRowParallelLinear
from .site import ReductionSite

# Options of Megatron's config under which its layer does not compute what a block without that sum relies on, what they
# must be, and why. Those that a version of Megatron does not have are left out.
NEEDED = {
    "sequence_parallel": (False, "each rank then holds other tokens, and no rank all of a partial sum's"),
    "inference_fuse_tp_communication": (False, "the residual is then added inside the reduction"),
    "mlp_chunks_for_prefill": (1, "the MLP then sums one chunk of the tokens at a time"),
}


@dataclass(slots=True)
class DroppedSum(ReductionSite):
    """Attention's place in a block without that sum: the partial sum stays as it is, and is kept for the MLP's sum."""

    takes_parts: ClassVar[bool] = False
    left: torch.Tensor | None = None

    def reduce(self, partial: torch.Tensor, group: torch.distributed.ProcessGroup, training: bool) -> torch.Tensor:
        if training or (partial.requires_grad and torch.is_grad_enabled()):
            raise RuntimeError(
                f"layer {self.layer}: a block without attention's sum is for inference: call model.eval() and use "
                "torch.no_grad(). Megatron would add up gradients over ranks that belong to one rank alone; "
                "`megatron-comp drop distill` trains such blocks"
            )
        self.stats.kept.calls += 1
        self.stats.kept_because[DROP] += 1
        # In eval mode Megatron adds bias and residual in place, to what is returned here.
        self.left = partial.clone()
        return partial

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """The next rows of the last partial sum, as many as of `like`; each once."""
        rows, self.left = _cut(self.left, like)
        return rows


@dataclass(slots=True)
class JoinedSum(OverlappedSum):
    """The MLP's place in that block: its partial sums and attention's in one message."""

    takes_parts: ClassVar[bool] = False  # of a linear: they would lack attention's
    dropped: DroppedSum | None = None

    def reduce(self, partial: torch.Tensor, group: torch.distributed.ProcessGroup, training: bool) -> torch.Tensor:
        return OverlappedSum.reduce(self, self.dropped.take(partial) + partial, group, training)


class SyncDropLayer(OverlappedLayer):
    """Megatron's layer without the sum after attention; parameters, checkpoints and arguments are the stock class's.

    `apply_compression` turns layers into it, by a policy's `layers: {5: {attention: drop}}`. In a hand-written layer
    spec it drops that sum from the start, the other one being Megatron's own; a policy applied later decides anew, and
    `remove_compression` makes it compute the stock layer. With one rank it is the stock layer.

    Raises ValueError for a layer that cannot do without that sum.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.drops, self.block_input = False, None
        if self.tp_group.size() > 1:
            policy = CompressionPolicy(layers={self.layer_number - 1: {"attention": DROP}})
            check_block(self)
            for place in find_places(self):
                place.attach(ReductionSite(policy, place.layer, place.site))
            drop_sync(self)

    def _forward_attention(self, *args, **kwargs):
        if self.drops:
            self.block_input = args[0] if args else kwargs["hidden_states"]
        return super()._forward_attention(*args, **kwargs)

    def _forward_post_mlp(self, mlp_output_with_bias, residual, *args, **kwargs):
        """`residual`: Megatron's is h_i, to which this rank's Y_i, summed by now, would be added a second time."""
        if self.drops:
            bias = _bias(self.self_attention.linear_proj)
            rows, self.block_input = _cut(self.block_input, residual)
            residual = rows if bias is None else rows + bias
        return super()._forward_post_mlp(mlp_output_with_bias, residual, *args, **kwargs)


def dropped_blocks(model: torch.nn.Module, policy: CompressionPolicy) -> list[torch.nn.Module]:
    """The model's layers, of whatever kind, for which a policy drops attention's sum."""
    layers = (module for module in model.modules() if isinstance(module, (TransformerLayer, MambaLayer)))
    return [layer for layer in layers if policy.drops(layer.layer_number - 1)]


def check_block(layer: torch.nn.Module) -> None:
    """Raises ValueError, with the reason, for a layer that cannot do without attention's sum."""
    problem = _problem(layer)
    if problem:
        raise ValueError(f"policy: layers: {layer.layer_number - 1}: attention cannot be dropped: {problem}")


def drop_sync(layer: torch.nn.Module) -> None:
    """Leaves out attention's sum of a layer whose linears reduce through `ReductionSite`s; `restore_sync` undoes it.

    With one rank there is no sum, and the layer stays as it is.
    """
    if layer.tp_group.size() == 1:
        return
    proj, fc2 = layer.self_attention.linear_proj, layer.mlp.linear_fc2
    proj.reduction = proj.reduction.turned(DroppedSum)
    fc2.reduction = fc2.reduction.turned(JoinedSum, dropped=proj.reduction)
    if type(layer) is TransformerLayer:
        layer.__class__ = SyncDropLayer
        layer.was_stock = True
    layer.drops, layer.block_input = True, None


def restore_sync(layer: SyncDropLayer) -> None:
    """The stock layer again. Its linears are restored by whoever restores linears."""
    layer.drops, layer.block_input = False, None
    if layer.__dict__.pop("was_stock", False):
        del layer.drops, layer.block_input
        layer.__class__ = TransformerLayer


def _problem(layer: torch.nn.Module) -> str | None:
    if type(layer) not in (TransformerLayer, OverlappedLayer, SyncDropLayer):
        return f"{type(layer).__name__} is no TransformerLayer of Megatron's"
    if not hasattr(TransformerLayer, "_forward_post_mlp"):
        return "this Megatron-Core's layer cannot be told what to add last; 0.16 and newer can"
    if isinstance(layer.mlp, BaseMoELayer):
        return "in a mixture of experts ranks would choose different experts for a token, each by what it sees"
    if not isinstance(layer.cross_attention, IdentityOp):
        return "the block has cross-attention, which would see what differs between ranks"
    for option, (wanted, why) in NEEDED.items():
        if (given := getattr(layer.config, option, wanted)) != wanted:
            return f"{option}={given}: {why}; set {option}={wanted}"
    if getattr(layer.config, "cuda_graph_impl", None) == "transformer_engine":
        return "cuda_graph_impl='transformer_engine' may replay a part of a block; use another cuda_graph_impl"
    for part, name in ((layer.self_attention, "linear_proj"), (layer.mlp, "linear_fc2")):
        linear = getattr(part, name, None)
        if transformer_engine.reduces(linear):
            transformer_engine.check_te_linear(linear)
        elif type(linear) not in (RowParallelLinear, CompressedRowParallelLinear):
            return f"its {name} is a {type(linear).__name__}, not a row-parallel linear that is known here"
    return None


def _bias(linear: torch.nn.Module) -> torch.Tensor | None:
    """Transformer Engine has an empty one for none."""
    bias = getattr(linear, "bias", None)
    return bias if bias is not None and bias.numel() else None


def _cut(rows: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As many of `[..., hidden]` rows, from the first, as `like` has, in its shape; and the others."""
    flat, count = rows.reshape(-1, rows.shape[-1]), like.shape[:-1].numel()
    return flat[:count].view(like.shape), flat[count:] if count < len(flat) else None
