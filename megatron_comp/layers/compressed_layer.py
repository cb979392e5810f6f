# SPDX-License-Identifier: Apache-2.0
"""Transformer layers that have their two sums in hand: they overlap them with the MLP, leave attention's out, or send
of both only what the other ranks cannot predict.

Overlap (prefill). All that follows attention in a layer treats every token alone. So rows go in parts, through both
sums:

    attention's projection  | part 0 | part 1 | part 2 |                                  sent as soon as it is computed
    its sums, on the wire            | part 0 | part 1 | part 2 |
    norm and MLP                              | part 0 | part 1 | part 2 |                as soon as its sum is there
    the MLP's sums, on the wire                        | part 0 | part 1 | part 2 |

The layer waits for a part of each sum, not for both of them. What travels is what travels in one piece, to the byte;
products of fewer rows may round otherwise where a BLAS chooses the order of its additions by shape.

Dropped sums: `sync_drop.py` says what they are. Here attention's partial sum is kept, and joins the MLP's.

Predicted sums: `predictor.py` says what they are. A rank takes its own prediction off what it sends, and adds that of
all ranks to what it gets. Where attention's sum is dropped, it adds the other ranks' predictions to its partial sum;
and to what it sends, the response of their MLPs to what they do not see.
In a mixture of experts the sum after attention is predicted here, and that of the experts in their token dispatcher.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer

from ..wire import exchange
from .moe import PredictedSum, summing_dispatcher
from .predictor import Known
from .reducer import Reducer, SumInParts
from .row_parallel import part_rows, send_parts

# Options of Megatron's config under which its layer does one thing after the other, as overlap needs it.
PLAIN = {"mlp_chunks_for_prefill": 1, "inference_fuse_tp_communication": False, "fp32_residual_connection": False}
# Methods of Megatron's layer, in which functions are replaced.
STOCK = ("forward", "_forward_attention", "_forward_mlp")


def compress_layer(layer: TransformerLayer) -> None:
    """From now on the layer's forward sums by itself what its linears' reducers say; `restore_layer` undoes it.

    With one rank there is no sum, and the layer stays as it is.
    """
    if layer.tp_group.size() > 1:
        layer.forward = partial(_forward, layer, can_overlap(layer))


def restore_layer(layer: torch.nn.Module) -> None:
    """The stock forward again; does nothing to other modules."""
    if getattr(vars(layer).get("forward"), "func", None) is _forward:
        del layer.forward


def _forward(layer: TransformerLayer, may_overlap: bool, /, *args, **kwargs):
    """Megatron's own forward; where a sum is ours to take, with other functions in some places of it for this call."""
    is_mixture = isinstance(layer.mlp, BaseMoELayer)
    summer = summing_dispatcher(layer.mlp) if is_mixture else layer.mlp.linear_fc2
    attention, mlp = layer.self_attention.linear_proj.reducer, summer.reducer
    overlaps = may_overlap and _overlaps_now(layer)
    if not (overlaps or attention.drops or attention.predictor or mlp.predictor):
        return type(layer).forward(layer, *args, **kwargs)
    return (_MixtureCall if is_mixture else _Call)(layer, summer, overlaps).forward(*args, **kwargs)


class _Call:
    """One call of a layer, with what its attention leaves for its MLP.

    Attention's sum is on the wire, or left out, when attention returns. The MLP's sum is taken here.
    summer: what sums the MLP where nothing here does: its second linear, or a mixture's token dispatcher.
    """

    def __init__(self, layer: TransformerLayer, summer: Any, overlaps: bool) -> None:
        self.layer, self.stock, self.overlaps = layer, type(layer), overlaps
        self.proj, self.summer = layer.self_attention.linear_proj, summer
        # Kept here, since the layer is without them during the call.
        self.attention_reducer, self.mlp_reducer = self.proj.reducer, self.summer.reducer
        self.attention_bda, self.mlp_bda = layer.self_attn_bda, layer.mlp_bda
        self.drops = self.attention_reducer.drops
        self.known: Known | None = None  # of attention's sum
        self.on_the_wire: SumInParts | None = None  # attention's sum
        self.residual: torch.Tensor | None = None  # what that is added to: X
        # Of a dropped sum: this rank's part Y_i, without what is known of it but with the response to it, and X + b,
        # with the response's bias.
        self.dropped: tuple[torch.Tensor, torch.Tensor] | None = None
        self.mlp_bias: torch.Tensor | None = None

    def forward(self, *args, **kwargs):
        """Megatron's, with the methods below in the places that they name."""
        in_layer = {
            "_forward_attention": self.forward_attention,
            "self_attn_bda": self.add_attention,
            "_forward_mlp": self.forward_mlp,
        }
        # Without its reducer a linear returns its partial sum, which is summed, or kept, here.
        in_proj: dict[str, object] = {"reducer": None} if self.drops or self.attention_reducer.predictor else {}
        if self.overlaps and not self.drops:
            in_proj["_forward_impl"] = partial(self.project, self.proj._forward_impl)
        with _replaced(self.proj, **in_proj), _replaced(self.layer, **in_layer):
            return self.stock.forward(self.layer, *args, **kwargs)

    def forward_attention(self, hidden_states: torch.Tensor, *rest, **more):
        """In place of `layer._forward_attention`."""
        if predict := self.attention_reducer.predictor_of(hidden_states):
            self.known = predict(hidden_states)
        return self.stock._forward_attention(self.layer, hidden_states, *rest, **more)

    def project(self, sum_product: Callable, input: torch.Tensor, weight: torch.Tensor, **how) -> torch.Tensor:
        """In place of `proj._forward_impl`, which is `sum_product`."""
        rows = part_rows(self.proj, self.attention_reducer, input)
        if len(rows) == 1:
            return sum_product(input, weight, **how)
        self.on_the_wire = send_parts(self.proj, self.attention_reducer, rows, input, weight, self.known, **how)
        return self.on_the_wire.out

    def add_attention(self, training: bool, fused: bool) -> Callable:
        """In place of `layer.self_attn_bda`."""
        add = self.attention_bda(training, fused)

        def add_to(output_with_bias: tuple, x: torch.Tensor, prob: float) -> torch.Tensor:
            output, bias = output_with_bias
            if self.on_the_wire is not None:
                self.residual = x  # added to each part as it arrives
                return output
            if self.drops:
                output = self._drop(output, bias, x, training)
            elif self.attention_reducer.predictor:
                output = self._sum_attention(output, training)
            return add((output, bias), x, prob)

        return add_to

    def _drop(self, output: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, training: bool) -> torch.Tensor:
        """What stands for a sum that is left out: the rank's partial sum, with the other ranks' predicted."""
        _count_drop(self.attention_reducer, output, training)
        base = x if bias is None else x + bias
        if self.known is None:
            self.dropped = output.clone(), base  # Megatron adds in place
            return output
        own, response = self.known.less_own(output), self.attention_reducer.predictor.response
        self.dropped = (own.clone(), base) if response is None else (response.added_to(own), base + response.bias)
        return self.known.plus_total(own)

    def _sum_attention(self, output: torch.Tensor, training: bool) -> torch.Tensor:
        if self.known is None:  # the gate leaves so small a sum alone
            return self.attention_reducer(output, training=training)
        return self.known.plus_total(self.attention_reducer(self.known.less_own(output), training=training))

    def keep_partial_sum(self, training: bool, fused: bool) -> Callable:
        """In place of `layer.mlp_bda`."""

        def keep(output_with_bias: tuple, _residual: torch.Tensor, prob: float) -> torch.Tensor:
            partial_sum, self.mlp_bias = output_with_bias
            return partial_sum

        return keep

    def forward_mlp(self, hidden: torch.Tensor, *rest, **more) -> torch.Tensor:
        """In place of `layer._forward_mlp`: part by part where that overlaps, otherwise all rows as one part."""
        layer, reducer = self.layer, self.mlp_reducer
        rows = reducer.part_rows(hidden.shape, hidden) if self.overlaps else [hidden.shape[:-1].numel()]
        joined_sum = reducer.begin(torch.empty_like(hidden)) if len(rows) > 1 else None
        complete, there, end = self._complete_rows(hidden), 0, 0
        own, base = self.dropped or (None, hidden)
        own_parts = () if own is None else _parts(own, rows)
        predict = None if self.drops else reducer.predictor_of(hidden)
        knowns = self.known.split(rows) if self.drops and self.known else []
        with _replaced(self.summer, reducer=None), _replaced(layer, mlp_bda=self.keep_partial_sum):
            for number, part in enumerate(_parts(hidden, rows)):
                end += rows[number]
                while there < end:
                    there = next(complete)
                partial_sum = self.stock._forward_mlp(layer, part, *rest, **more)
                if own_parts:
                    partial_sum = own_parts[number] + partial_sum
                elif predict:
                    known = predict(part)
                    partial_sum = known.less_own(partial_sum)
                    knowns.append(known)
                if joined_sum is not None:
                    joined_sum.push(partial_sum)
        sums = [reducer(partial_sum, training=layer.training)] if joined_sum is None else joined_sum
        add = self.mlp_bda(layer.training, layer.config.bias_dropout_fusion)
        outputs = []
        for each, part, known in zip_longest(sums, _parts(base, rows), knowns):
            complete_sum = each if known is None else known.plus_total(each)
            outputs.append(add((complete_sum.view_as(part), self.mlp_bias), part, layer.hidden_dropout))
        return outputs[0] if len(rows) == 1 else torch.cat(outputs).view(hidden.shape)

    def _complete_rows(self, hidden: torch.Tensor) -> Iterator[int]:
        """How many rows of `hidden` are complete, each time that more are: sums that arrive, plus the residual."""
        end = 0
        for part in self.on_the_wire or ():
            start, end = end, end + len(part)
            if self.known is not None:
                self.known._replace(small=self.known.small[start:end]).plus_total(part)
            part += self.residual.reshape(-1, part.shape[-1])[start:end]
            yield end
        yield hidden.shape[:-1].numel()


class _MixtureCall(_Call):
    """Of a mixture of experts, whose token dispatcher takes the sum among other things that it does."""

    def forward_mlp(self, hidden: torch.Tensor, *rest, **more) -> torch.Tensor:
        with _replaced(self.summer, reducer=PredictedSum(self.mlp_reducer, hidden)):
            return self.stock._forward_mlp(self.layer, hidden, *rest, **more)


@contextmanager
def _replaced(module: object, **attributes) -> Iterator[None]:
    """Inside, the module has these attributes; afterwards, also after an error, what it had before."""
    own = vars(module)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del own[name]
        own.update(before)


def _parts(x: torch.Tensor, rows: list[int]) -> Sequence[torch.Tensor]:
    """`[sequence, batch, hidden]` itself, or so many of its rows `[rows, 1, hidden]` each."""
    return [x] if len(rows) == 1 else x.reshape(-1, 1, x.shape[-1]).split(rows)


def _count_drop(reducer: Reducer, partial_sum: torch.Tensor, training: bool) -> None:
    """Counts a dropped sum. Raises RuntimeError where gradients would pass it."""
    if training or partial_sum.requires_grad:
        raise RuntimeError(
            f"layer {reducer.layer}: a block without attention's sum is for inference: call model.eval() and use "
            "torch.no_grad(). Megatron would add up gradients over ranks that belong to one rank alone; "
            "`megatron-comp drop distill` trains such blocks"
        )
    reducer.meter.record(reducer.choose(partial_sum.shape, partial_sum), partial_sum.is_cuda)


def _overlaps_now(layer: TransformerLayer) -> bool:
    """Not for decoded tokens, nor where somebody looks at what is still without its sum, or in parts."""
    if layer.training or layer.mlp.linear_fc2.reducer.phase.name == "decode":
        return False
    return not any(
        module._forward_hooks or module._forward_pre_hooks for module in layer.modules() if module is not layer
    )


def can_overlap(layer: torch.nn.Module) -> bool:
    """Whether its MLP can begin before attention's sum is complete, it has sums of ours, and its device gains by it."""
    if not isinstance(layer, TransformerLayer) or any(
        getattr(type(layer), name) is not getattr(TransformerLayer, name) for name in STOCK
    ):
        return False
    if type(layer.mlp) is not MLP or layer.tp_group.size() == 1:
        return False
    if type(layer.self_attention) not in (SelfAttention, MLASelfAttention):
        return False
    linears = layer.self_attention.linear_proj, layer.mlp.linear_fc2
    return (
        isinstance(layer.cross_attention, IdentityOp)
        and all(getattr(layer.config, option, wanted) == wanted for option, wanted in PLAIN.items())
        and all(getattr(type(linear), "forward", None) is RowParallelLinear.forward for linear in linears)
        and all(isinstance(getattr(linear, "reducer", None), Reducer) for linear in linears)
        and bool(layer.mlp.linear_fc2.reducer.codecs)
        and exchange.overlap_bytes(layer.mlp.linear_fc2.weight.device.type) is not None
        # A bias would be added before the sum, in another order than Megatron's.
        and all(linear.bias is None and not linear.sequence_parallel for linear in linears)
    )
