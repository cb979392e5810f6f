# SPDX-License-Identifier: Apache-2.0
"""Transformer layers that do without the sum over ranks after attention (SPD, arXiv 2502.20727): which ones can.

With X the layer's input `[sequence, batch, hidden]`, equal on all ranks, b and b2
the biases of attention's and of the MLP's output projection, and Y_i and Z_i rank i's partial sums of them, before
their biases:

    stock      h = X + b + sum_i Y_i          Z_i = MLP_i(norm(h))                  out = h + b2 + sum_i Z_i
    dropped    h_i = X + b + Y_i              Z_i = MLP_i(norm(h_i))                out = X + b + b2 + sum_i (Y_i + Z_i)

One sum instead of two, of a message of the same shape, compressed or not as the policy says of the layer's MLP. The
residual X never travels. The output differs from the stock one only by what the MLP sees.

What ranks may differ in: Y_i, h_i, Z_i, and everything between them inside of the layer. What they may not: X, and so
all queries, keys and values that are computed from it and stay in a cache; and the output, which is made of X, biases
and a sum that has the same bits on every rank. Nothing that is kept beyond the layer depends on h_i.
"""

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from ..policy import DROP, CompressionPolicy
from . import moe, transformer_engine
from .compressed_layer import compress_layer
from .places import find_places, numbered_layers
from .reducer import Reducer
from .row_parallel import runs_forward_of

# Options of Megatron's config under which its layer does not compute what a layer without that sum relies on, what they
# must be, and why. Those that a version of Megatron does not have are left out.
NEEDED = {
    "sequence_parallel": (False, "each rank then holds other tokens, and no rank all of a partial sum's"),
    "inference_fuse_tp_communication": (False, "the residual is then added inside the reduction"),
    "mlp_chunks_for_prefill": (1, "the MLP then sums one chunk of the tokens at a time"),
}
MIXTURE = "in a mixture of experts ranks would choose different experts for a token, each by what it sees"


class SyncDropLayer(TransformerLayer):
    """Megatron's layer without the sum after attention, for hand-written layer specs.

    It drops that sum from the start, the other one being Megatron's own; a policy applied later decides anew, and
    `remove_compression` makes it compute the stock layer. Parameters, checkpoints and arguments are the stock class's.
    With one rank it is the stock layer. In a built model, say `layers: {5: {attention: drop}}` in a policy instead.

    Raises ValueError for a layer that cannot do without that sum.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.tp_group.size() > 1:
            policy = CompressionPolicy(layers={self.layer_number - 1: {"attention": DROP}})
            check_block(self, self.layer_number - 1)
            for place in find_places(self):
                place.attach(Reducer(policy, place.layer, place.site, place.group))
            compress_layer(self)


def dropped_blocks(model: torch.nn.Module, policy: CompressionPolicy) -> dict[torch.nn.Module, int]:
    """The model's layers, of whatever kind, for which a policy drops attention's sum, with their numbers."""
    return {layer: number for layer, number in numbered_layers(model) if policy.drops(number)}


def check_block(layer: torch.nn.Module, number: int) -> None:
    """Raises ValueError, with the reason, for a layer that cannot do without attention's sum."""
    is_mixture = isinstance(getattr(layer, "mlp", None), BaseMoELayer)
    if problem := MIXTURE if is_mixture else problem_of(layer):
        raise ValueError(f"policy: layers: {number}: attention cannot be dropped: {problem}")


def problem_of(layer: torch.nn.Module) -> str | None:
    """Why a layer cannot take its two sums into its own hands; None if it can."""
    if type(layer) not in (TransformerLayer, SyncDropLayer):
        return f"{type(layer).__name__} is no TransformerLayer of Megatron's"
    if not isinstance(layer.cross_attention, IdentityOp):
        return "the block has cross-attention, which would see what differs between ranks"
    for option, (wanted, why) in NEEDED.items():
        if (given := getattr(layer.config, option, wanted)) != wanted:
            return f"{option}={given}: {why}; set {option}={wanted}"
    if getattr(layer.config, "cuda_graph_impl", None) == "transformer_engine":
        return "cuda_graph_impl='transformer_engine' may replay a part of a block; use another cuda_graph_impl"
    linears = [(layer.self_attention, "linear_proj")]
    if isinstance(layer.mlp, BaseMoELayer):
        if problem := moe.prediction_problem(layer.mlp):
            return problem
    else:
        linears.append((layer.mlp, "linear_fc2"))
    for part, name in linears:
        linear = getattr(part, name, None)
        if transformer_engine.reduces(linear):
            transformer_engine.check_te_linear(linear)
            if transformer_engine.norms_its_sum(linear):
                return f"its {name} has a norm behind the sum"
        elif not runs_forward_of(RowParallelLinear, linear):
            return f"its {name} is a {type(linear).__name__}, not a row-parallel linear that is known here"
    return None
