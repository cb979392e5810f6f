# SPDX-License-Identifier: Apache-2.0
"""Which rows and columns of which tensors of a Hugging Face checkpoint make up each parameter of a rank.

Names and slices alone: `hf.py` reads them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Piece(NamedTuple):
    """A block of a checkpoint tensor: `tensor[rows[0]:rows[1], columns[0]:columns[1]]`; vectors have no columns.

    index: which of the matrices in a tensor of three dimensions.
    """

    tensor: str
    shape: tuple[int, ...]
    rows: tuple[int, int]
    columns: tuple[int, int] | None = None
    index: int | None = None


class Share(NamedTuple):
    """Which part of every split tensor a rank owns, which of the experts, and which stage's layers."""

    rank: int
    tp: int
    expert_rank: int = 0
    ep: int = 1
    stage: int = 0
    stages: int = 1

    def of(self, size: int) -> tuple[int, int]:
        """Its rows or columns of `size`, first and last (exclusive)."""
        return size * self.rank // self.tp, size * (self.rank + 1) // self.tp

    def experts(self, count: int) -> range:
        return range(count * self.expert_rank // self.ep, count * (self.expert_rank + 1) // self.ep)

    def layers(self, count: int) -> range:
        """Of the whole model's, numbered from 0."""
        of_stages = layers_of_stages(count, self.stages)
        first = sum(of_stages[: self.stage])
        return range(first, first + of_stages[self.stage])


WHOLE = Share(0, 1)


def head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def check_tensor_parallel(config, tensor_parallel: int) -> None:
    """Raises ValueError, naming the sizes that work, if a model of this config cannot be split into so many ranks."""
    problem = _split_problem(config, tensor_parallel)
    if problem:
        allowed = [n for n in range(1, config.num_attention_heads + 1) if not _split_problem(config, n)]
        raise ValueError(f"tensor_parallel {tensor_parallel} {problem}; this model allows {allowed}")


def _split_problem(config, tp: int) -> str | None:
    heads, groups, ffn = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    if tp < 1:
        return "is less than 1"
    if heads % tp:
        return f"does not divide {heads} attention heads"
    if groups % tp and tp % groups:
        return f"is neither a multiple nor a divisor of {groups} key-value heads"
    if ffn % tp:
        return f"does not divide intermediate_size {ffn}"
    qkv_rows = (heads + 2 * groups) * head_dim(config)
    if qkv_rows % tp:
        return f"does not divide the {qkv_rows} rows of the fused query, key and value projection"
    return None


def check_pipeline_parallel(config, stages: int) -> None:
    """Raises ValueError if there are more stages than layers."""
    if not 1 <= stages <= config.num_hidden_layers:
        raise ValueError(f"pipeline_parallel is {stages}, but this model has {config.num_hidden_layers} layers")


def check_shapes(config, found: Mapping[str, tuple[Path, list[int]]], path: Path) -> None:
    """Raises ValueError if weights are missing, or of another size than the config says: before anything of that size
    is made.

    config: a checkpoint's sizes, in the file `path`. found: of each tensor that there is its file and shape.
    """
    layers = {int(name.split(".")[2]) for name in found if re.match(r"model\.layers\.[0-9]{1,9}\.", name)}
    if layers and config.num_hidden_layers != max(layers) + 1:
        raise ValueError(
            f"{path}: num_hidden_layers is {config.num_hidden_layers}, but the weights are of {max(layers) + 1} layers"
        )
    fused = any(name.endswith("mlp.experts.gate_up_proj") for name in found)
    pieces = (each for those in plan(config, WHOLE, fused).values() for each in those)
    for name, expected in {piece.tensor: list(piece.shape) for piece in pieces}.items():
        if name not in found:
            if name == EMBEDDING and config.tie_word_embeddings and HEAD in found:
                continue
            raise ValueError(f"{path.parent}: tensor {name} is missing; expected one of shape {expected}")
        file, shape = found[name]
        if shape != expected:
            raise ValueError(f"{file}: tensor {name} has shape {shape}, expected {expected}")


def layers_of_stages(layers: int, stages: int) -> list[int]:
    """How many layers each stage has: as many in all stages but the first and the last, as Megatron wants it.

    These two have fewer if layers do not divide evenly, the last one fewest: they also embed and predict. 30 layers in
    4 stages are 7, 8, 8 and 7.
    """
    if layers % stages == 0:
        return [layers // stages] * stages
    between = -(-layers // stages)
    if layers - (stages - 2) * between < 2:  # nothing would be left for one of the two
        between -= 1
    rest = layers - (stages - 2) * between
    return [rest - rest // 2, *[between] * (stages - 2), rest // 2]


def padded_vocab_size(config, tp: int) -> int:
    """The vocabulary rounded up to a multiple of `tp`."""
    return -(-config.vocab_size // tp) * tp


def plan(config, share: Share, fused_experts: bool = False) -> dict[str, list[Piece]]:
    """The parameters of Megatron's GPTModel on one rank, each as pieces to stack along dim 0.

    A stage numbers its layers from 0. Tied embeddings are read by the first stage and by the last.

    A parameter with fewer rows in its pieces than it has itself ends in zeros (the padded vocabulary).
    fused_experts: the checkpoint has all experts of a layer in one tensor.
    """
    hidden = config.hidden_size
    query_size = config.num_attention_heads * head_dim(config)

    def vector(name: str) -> list[Piece]:
        return [Piece(name, (hidden,), (0, hidden))]

    def vocabulary(name: str) -> list[Piece]:
        start, stop = share.of(padded_vocab_size(config, share.tp))
        rows = min(start, config.vocab_size), min(stop, config.vocab_size)
        return [Piece(name, (config.vocab_size, hidden), rows, (0, hidden))] if rows[0] < rows[1] else []

    is_first, is_last = share.stage == 0, share.stage == share.stages - 1
    parameters = {"embedding.word_embeddings.weight": vocabulary(EMBEDDING)} if is_first else {}
    for place, layer in enumerate(share.layers(config.num_hidden_layers)):
        ours, theirs = f"decoder.layers.{place}.", f"model.layers.{layer}."
        parameters |= {
            ours + "input_layernorm.weight": vector(theirs + "input_layernorm.weight"),
            ours + "self_attention.linear_qkv.weight": _fused_qkv(config, theirs + "self_attn.", share),
            ours + "self_attention.linear_proj.weight": [
                Piece(theirs + "self_attn.o_proj.weight", (hidden, query_size), (0, hidden), share.of(query_size))
            ],
            ours + "pre_mlp_layernorm.weight": vector(theirs + "post_attention_layernorm.weight"),
        }
        mlp = _mixture if is_mixture(config) else _mlp
        parameters |= mlp(config, ours + "mlp.", theirs, share, fused_experts)
    if is_last:
        parameters["decoder.final_layernorm.weight"] = vector("model.norm.weight")
    if is_last and not (config.tie_word_embeddings and is_first):
        head = EMBEDDING if config.tie_word_embeddings else HEAD
        parameters["output_layer.weight"] = vocabulary(head)
    return parameters


def is_mixture(config) -> bool:
    return config.model_type == "mixtral"


def _mlp(config, ours: str, theirs: str, share: Share, _fused: bool) -> dict[str, list[Piece]]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    names = [f"{theirs}mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    return _gated(ours, share.of(ffn), [(name, (ffn, hidden)) for name in names[:2]], (names[2], (hidden, ffn)))


def _mixture(config, ours: str, theirs: str, share: Share, fused: bool) -> dict[str, list[Piece]]:
    """Router and this rank's experts: `block_sparse_moe.experts.E.w1 w2 w3`, or all experts in `mlp.experts.*`."""
    hidden, ffn, count = config.hidden_size, config.intermediate_size, config.num_local_experts
    block = theirs + ("mlp." if fused else "block_sparse_moe.")
    parameters = {ours + "router.weight": [Piece(block + "gate.weight", (count, hidden), (0, count), (0, hidden))]}
    for place, expert in enumerate(share.experts(count)):
        name = f"{ours}experts.local_experts.{place}."
        if fused:
            both, down = (count, 2 * ffn, hidden), (count, hidden, ffn)
            gate_up = [(block + "experts.gate_up_proj", both)] * 2
            parameters |= _gated(name, share.of(ffn), gate_up, (block + "experts.down_proj", down), expert)
        else:
            w1, w2, w3 = (f"{block}experts.{expert}.w{n}.weight" for n in (1, 2, 3))
            gate_up = [(w1, (ffn, hidden)), (w3, (ffn, hidden))]
            parameters |= _gated(name, share.of(ffn), gate_up, (w2, (hidden, ffn)))
    return parameters


def _gated(ours: str, part: tuple[int, int], gate_up: list, down: tuple, index: int | None = None) -> dict:
    """fc1 as gate rows over up rows, fc2 as columns. With `index`, gate and up stand in one tensor, up second."""
    (gate, shape), (up, _) = gate_up
    hidden, ffn = shape[-1], down[1][-1]
    second = 0 if index is None else ffn
    return {
        ours + "linear_fc1.weight": [
            Piece(gate, shape, part, (0, hidden), index),
            Piece(up, shape, (second + part[0], second + part[1]), (0, hidden), index),
        ],
        ours + "linear_fc2.weight": [Piece(*down, (0, hidden), part, index)],
    }


def _fused_qkv(config, prefix: str, share: Share) -> list[Piece]:
    """This rank's rows of Megatron's fused projection: for each group its query heads, its key head, its value head.

    With more ranks than groups a share may begin and end inside a group, and even inside a head.
    """
    dim, groups, hidden = head_dim(config), config.num_key_value_heads, config.hidden_size
    per_group = {"q": config.num_attention_heads // groups * dim, "k": dim, "v": dim}
    start, stop = share.of(groups * sum(per_group.values()))
    pieces, position = [], 0
    for group in range(groups):
        for part, rows in per_group.items():
            first, last = max(start - position, 0), min(stop - position, rows)
            if first < last:
                block = group * rows + first, group * rows + last
                pieces.append(Piece(f"{prefix}{part}_proj.weight", (groups * rows, hidden), block, (0, hidden)))
            position += rows
    return pieces
