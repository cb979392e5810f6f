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
all ranks to what it gets. Where attention's sum is dropped, it adds the other ranks' predictions to its partial sum.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer

from ..wire import exchange
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
    """Megatron's own forward, with other functions in some places of it, for the time of this one call.

    Attention's sum is on the wire, or left out, when attention returns. The MLP's sum is taken here.
    """
    proj, fc2 = layer.self_attention.linear_proj, layer.mlp.linear_fc2
    attention_reducer, mlp_reducer = proj.reducer, fc2.reducer
    drops, overlaps = attention_reducer.drops, may_overlap and _overlaps_now(layer)
    predicts = attention_reducer.predictor or mlp_reducer.predictor
    if not (drops or overlaps or predicts):
        return type(layer).forward(layer, *args, **kwargs)
    attention_bda, mlp_bda = layer.self_attn_bda, layer.mlp_bda
    known: Known | None = None  # of attention's sum
    on_the_wire: SumInParts | None = None  # attention's sum
    residual: torch.Tensor | None = None  # what that is added to: X
    # Of a dropped sum: this rank's part Y_i, without what is known of it, and X + b.
    dropped: tuple[torch.Tensor, torch.Tensor] | None = None
    mlp_bias: torch.Tensor | None = None

    def forward_attention(hidden_states: torch.Tensor, *rest, **more):  # in place of layer._forward_attention
        nonlocal known
        if predict := attention_reducer.predictor_of(hidden_states):
            known = predict(hidden_states)
        return type(layer)._forward_attention(layer, hidden_states, *rest, **more)

    # In place of proj._forward_impl, which is `sum_product`.
    def project(sum_product: Callable, input: torch.Tensor, weight: torch.Tensor, **how) -> torch.Tensor:
        nonlocal on_the_wire
        if len(rows := part_rows(proj, attention_reducer, input)) == 1:
            return sum_product(input, weight, **how)
        on_the_wire = send_parts(proj, attention_reducer, rows, input, weight, known, **how)
        return on_the_wire.out

    def add_attention(training: bool, fused: bool):  # in place of layer.self_attn_bda
        def add(output_with_bias: tuple, x: torch.Tensor, prob: float) -> torch.Tensor:
            nonlocal dropped, residual
            output, bias = output_with_bias
            if on_the_wire is not None:
                residual = x  # added to each part as it arrives
                return output
            if drops:
                _drop(attention_reducer, output, training)
                own = output.clone() if known is None else output - known.own  # Megatron adds in place
                dropped = own, x if bias is None else x + bias
                output = output if known is None else own + known.total
            elif attention_reducer.predictor:
                output = attention_reducer(output if known is None else output - known.own, training=training)
                output = output if known is None else output + known.total
            return attention_bda(training, fused)((output, bias), x, prob)

        return add

    def keep_partial_sum(training: bool, fused: bool):  # in place of layer.mlp_bda
        def keep(output_with_bias: tuple, _residual: torch.Tensor, prob: float) -> torch.Tensor:
            nonlocal mlp_bias
            partial_sum, mlp_bias = output_with_bias
            return partial_sum

        return keep

    def forward_mlp(hidden: torch.Tensor, *rest, **more) -> torch.Tensor:  # in place of layer._forward_mlp
        rows = mlp_reducer.part_rows(hidden.shape, hidden) if overlaps else [hidden.shape[:-1].numel()]
        joined_sum = mlp_reducer.begin(torch.empty_like(hidden)) if len(rows) > 1 else None
        complete, there, end = _complete_rows(hidden, on_the_wire, residual, known), 0, 0
        own, base = dropped or (None, hidden)
        own_parts = () if own is None else _parts(own, rows)
        predict = None if drops else mlp_reducer.predictor_of(hidden)
        totals = list(_parts(known.total, rows)) if drops and known else []
        for number, part in enumerate(_parts(hidden, rows)):
            end += rows[number]
            while there < end:
                there = next(complete)
            partial_sum = type(layer)._forward_mlp(layer, part, *rest, **more)
            if own_parts:
                partial_sum = own_parts[number] + partial_sum
            elif predict:
                known_part = predict(part)
                partial_sum = partial_sum - known_part.own
                totals.append(known_part.total)
            if joined_sum is not None:
                joined_sum.push(partial_sum)
        sums = [mlp_reducer(partial_sum, training=layer.training)] if joined_sum is None else joined_sum
        add = mlp_bda(layer.training, layer.config.bias_dropout_fusion)
        outputs = []
        for each, part, total in zip_longest(sums, _parts(base, rows), totals):
            each = each.view_as(part) if total is None else each.view_as(part) + total.view_as(part)
            outputs.append(add((each, mlp_bias), part, layer.hidden_dropout))
        return outputs[0] if len(rows) == 1 else torch.cat(outputs).view(hidden.shape)

    # Without its reducer the linear returns its partial sum, which is summed, or kept, above.
    in_proj: dict[str, object] = {"reducer": None} if drops or attention_reducer.predictor else {}
    if overlaps and not drops:
        in_proj["_forward_impl"] = partial(project, proj._forward_impl)
    in_layer = {
        "_forward_attention": forward_attention,
        "self_attn_bda": add_attention,
        "mlp_bda": keep_partial_sum,
        "_forward_mlp": forward_mlp,
    }
    with _replaced(proj, **in_proj), _replaced(fc2, reducer=None), _replaced(layer, **in_layer):
        return type(layer).forward(layer, *args, **kwargs)


@contextmanager
def _replaced(module: torch.nn.Module, **attributes) -> Iterator[None]:
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


def _complete_rows(
    hidden: torch.Tensor, on_the_wire: SumInParts | None, residual: torch.Tensor | None, known: Known | None
) -> Iterator[int]:
    """How many rows of `hidden` are complete, each time that more are: sums that arrive there, plus the residual."""
    end = 0
    for part in on_the_wire or ():
        start, end = end, end + len(part)
        if known is not None:
            part += known.total.reshape(-1, part.shape[-1])[start:end]
        part += residual.reshape(-1, part.shape[-1])[start:end]
        yield end
    yield hidden.shape[:-1].numel()


def _drop(reducer: Reducer, partial_sum: torch.Tensor, training: bool) -> None:
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
