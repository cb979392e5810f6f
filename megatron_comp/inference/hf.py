"""Hugging Face Llama folders: the config, and the weights of one tensor-parallel rank.

`plan` says which rows and columns of which tensors make up each parameter of a rank; `load_weights` reads exactly
those. No process ever holds more of a checkpoint than its own share.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig

ARCHITECTURES = {"llama": "LlamaForCausalLM"}  # model_type -> architecture
ROPE_TYPES = ("default", "linear", "llama3")
FLOAT_TYPES = ("F16", "BF16", "F32", "F64")


def read_config(model_dir) -> PretrainedConfig:
    """The config of a Llama checkpoint folder.

    Raises ValueError if there is none, if it is of another architecture, or if it asks for what is not built here.
    """
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: expected the folder of a Hugging Face checkpoint")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds no JSON object")
    model_type, architectures = raw.get("model_type"), raw.get("architectures") or []
    expected = ARCHITECTURES.get(model_type)
    if expected is None or (architectures and expected not in architectures):
        allowed = ", ".join(f"{a} (model_type {t})" for t, a in ARCHITECTURES.items())
        given = f"{', '.join(architectures) or 'no architecture'} (model_type {model_type})"
        raise ValueError(f"{path}: {given} is not supported; allowed: {allowed}")
    try:
        config = AutoConfig.from_pretrained(model_dir)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"{path} is not a valid {model_type} config: {error}") from None
    _check_config(config, path)
    return config


def _check_config(config, path) -> None:
    for option in ("attention_bias", "mlp_bias"):
        if getattr(config, option, False):
            raise ValueError(f"{path}: {option} is true; only Llama models without biases are supported")
    if config.hidden_act != "silu":
        raise ValueError(f"{path}: hidden_act is {config.hidden_act!r}; allowed: 'silu'")
    rope = config.rope_parameters
    if rope["rope_type"] not in ROPE_TYPES:
        allowed = ", ".join(ROPE_TYPES)
        raise ValueError(f"{path}: rope type {rope['rope_type']!r} is not supported; allowed: {allowed}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{path}: partial_rotary_factor is {rope['partial_rotary_factor']}; only 1.0 is supported")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise ValueError(f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")


class Piece(NamedTuple):
    """A block of a checkpoint tensor: `tensor[rows[0]:rows[1], columns[0]:columns[1]]`; vectors have no columns."""

    tensor: str
    shape: tuple[int, ...]
    rows: tuple[int, int]
    columns: tuple[int, int] | None = None


def head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def padded_vocab_size(config, tp: int) -> int:
    """The vocabulary rounded up to a multiple of `tp`."""
    return -(-config.vocab_size // tp) * tp


def plan(config, rank: int, tp: int) -> dict[str, list[Piece]]:
    """The parameters of Megatron's GPTModel on one rank, each as pieces to stack along dim 0.

    A parameter with fewer rows in its pieces than it has itself ends in zeros (the padded vocabulary).
    """
    hidden, ffn = config.hidden_size, config.intermediate_size
    query_size = config.num_attention_heads * head_dim(config)

    def share(size: int) -> tuple[int, int]:
        return size * rank // tp, size * (rank + 1) // tp

    def vector(name: str) -> list[Piece]:
        return [Piece(name, (hidden,), (0, hidden))]

    def vocabulary(name: str) -> list[Piece]:
        start, stop = share(padded_vocab_size(config, tp))
        rows = min(start, config.vocab_size), min(stop, config.vocab_size)
        return [Piece(name, (config.vocab_size, hidden), rows, (0, hidden))] if rows[0] < rows[1] else []

    def split_columns(name: str, columns: int) -> list[Piece]:
        return [Piece(name, (hidden, columns), (0, hidden), share(columns))]

    parameters = {"embedding.word_embeddings.weight": vocabulary("model.embed_tokens.weight")}
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        gate_and_up = [
            Piece(f"{theirs}mlp.{part}_proj.weight", (ffn, hidden), share(ffn), (0, hidden)) for part in ("gate", "up")
        ]
        parameters |= {
            ours + "input_layernorm.weight": vector(theirs + "input_layernorm.weight"),
            ours + "self_attention.linear_qkv.weight": _fused_qkv(config, theirs + "self_attn.", share),
            ours + "self_attention.linear_proj.weight": split_columns(theirs + "self_attn.o_proj.weight", query_size),
            ours + "pre_mlp_layernorm.weight": vector(theirs + "post_attention_layernorm.weight"),
            ours + "mlp.linear_fc1.weight": gate_and_up,
            ours + "mlp.linear_fc2.weight": split_columns(theirs + "mlp.down_proj.weight", ffn),
        }
    parameters["decoder.final_layernorm.weight"] = vector("model.norm.weight")
    if not config.tie_word_embeddings:
        parameters["output_layer.weight"] = vocabulary("lm_head.weight")
    return parameters


def _fused_qkv(config, prefix: str, share) -> list[Piece]:
    """This rank's rows of Megatron's fused projection: for each group its query heads, its key head, its value head.

    With more ranks than groups a share may begin and end inside a group, and even inside a head.
    """
    dim, groups, hidden = head_dim(config), config.num_key_value_heads, config.hidden_size
    per_group = {"q": config.num_attention_heads // groups * dim, "k": dim, "v": dim}
    start, stop = share(groups * sum(per_group.values()))
    pieces, position = [], 0
    for group in range(groups):
        for part, rows in per_group.items():
            first, last = max(start - position, 0), min(stop - position, rows)
            if first < last:
                block = group * rows + first, group * rows + last
                pieces.append(Piece(f"{prefix}{part}_proj.weight", (groups * rows, hidden), block, (0, hidden)))
            position += rows
    return pieces


class Checkpoint:
    """The safetensors file, or the shards with their index, of a checkpoint folder. A context manager."""

    def __init__(self, model_dir):
        self.folder = Path(model_dir)
        self._open = {}
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if single.is_file():
            self._file_of = dict.fromkeys(self._file(single.name).keys(), single.name)
        elif index.is_file():
            try:
                self._file_of = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{index} is not an index of safetensors shards: {error!r}") from None
        else:
            raise FileNotFoundError(f"{self.folder} holds neither {single.name} nor {index.name}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._open.clear()  # the files close with their handles

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def read(self, piece: Piece) -> torch.Tensor:
        """Only the piece's rows and columns, in the file's dtype.

        Raises FileNotFoundError for a missing shard, ValueError for a damaged one, a missing tensor, or one of
        another shape or type than the config asks for.
        """
        name, expected = piece.tensor, list(piece.shape)
        if name not in self._file_of:
            raise ValueError(f"{self.folder}: tensor {name} is missing; expected one of shape {expected}")
        file = self._file_of[name]
        try:
            block = self._file(file).get_slice(name)
            shape, dtype = list(block.get_shape()), block.get_dtype()
            if shape != expected:
                raise ValueError(f"{self.folder / file}: tensor {name} has shape {shape}, expected {expected}")
            if dtype not in FLOAT_TYPES:
                allowed = ", ".join(FLOAT_TYPES)
                raise ValueError(f"{self.folder / file}: tensor {name} is of type {dtype}, expected one of {allowed}")
            rows = slice(*piece.rows)
            return block[rows] if piece.columns is None else block[rows, slice(*piece.columns)]
        except SafetensorError as error:
            raise ValueError(f"{self.folder / file}: cannot read tensor {name} of shape {expected}: {error}") from None

    def _file(self, name: str):
        if name not in self._open:
            path = self.folder / name
            if not path.is_file():
                raise FileNotFoundError(f"shard {path} is missing")
            try:
                self._open[name] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged or incomplete ({path.stat().st_size} bytes): {error}") from None
        return self._open[name]


@torch.no_grad()
def load_weights(model, model_dir, config) -> None:
    """Fills this rank's parameters of a built GPTModel from a checkpoint folder, cast to the parameters' dtype.

    Raises FileNotFoundError or ValueError, naming file and tensor, if the checkpoint is incomplete, damaged, of other
    shapes than the config says, or holds weights that the model has no place for.
    """
    rank, tp = model.pg_collection.tp.rank(), model.pg_collection.tp.size()
    pieces_of = plan(config, rank, tp)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == pieces_of.keys(), sorted(parameters.keys() ^ pieces_of.keys())
    with Checkpoint(model_dir) as checkpoint:
        _check_names(checkpoint, config)
        for name, parameter in parameters.items():
            row = 0
            for piece in pieces_of[name]:
                block = checkpoint.read(piece)
                parameter[row : row + len(block)].copy_(block)
                row += len(block)
            parameter[row:].zero_()


def _check_names(checkpoint: Checkpoint, config) -> None:
    """A weight without a place, a bias for example, would be left out in silence and the output would be wrong."""
    known = {piece.tensor for pieces in plan(config, 0, 1).values() for piece in pieces}
    # Some files repeat the tied embeddings, and old ones carry the rotary frequencies that follow from the config.
    harmless = {name for name in checkpoint.names if name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")}
    unknown = sorted(checkpoint.names - known - harmless)
    if unknown:
        count, first = len(unknown), unknown[0]
        raise ValueError(f"{checkpoint.folder}: {count} tensors have no place in this model, the first is {first}")
