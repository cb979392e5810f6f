"""Hugging Face Llama and Mixtral folders: the config, and the weights of one rank.

`plan` says which rows and columns of which tensors make up each parameter of a rank; `load_weights` reads exactly
those. No process ever holds more of a checkpoint than its own share.
"""

import json
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM"}  # model_type -> architecture
ROPE_TYPES = ("default", "linear", "llama3")
FLOAT_TYPES = ("F16", "BF16", "F32", "F64")


def read_config(model_dir) -> PretrainedConfig:
    """The config of a checkpoint folder.

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
            raise ValueError(f"{path}: {option} is true; only models without biases are supported")
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
    if getattr(config, "sliding_window", None) is not None:
        raise ValueError(f"{path}: sliding_window is {config.sliding_window}; only null is supported")


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
    """Which part of every split tensor a rank owns, and which of the experts."""

    rank: int
    tp: int
    expert_rank: int = 0
    ep: int = 1

    def of(self, size: int) -> tuple[int, int]:
        """Its rows or columns of `size`, first and last (exclusive)."""
        return size * self.rank // self.tp, size * (self.rank + 1) // self.tp

    def experts(self, count: int) -> range:
        return range(count * self.expert_rank // self.ep, count * (self.expert_rank + 1) // self.ep)


WHOLE = Share(0, 1)


def head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def padded_vocab_size(config, tp: int) -> int:
    """The vocabulary rounded up to a multiple of `tp`."""
    return -(-config.vocab_size // tp) * tp


def plan(config, share: Share, fused_experts: bool = False) -> dict[str, list[Piece]]:
    """The parameters of Megatron's GPTModel on one rank, each as pieces to stack along dim 0.

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

    parameters = {"embedding.word_embeddings.weight": vocabulary("model.embed_tokens.weight")}
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
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
    parameters["decoder.final_layernorm.weight"] = vector("model.norm.weight")
    if not config.tie_word_embeddings:
        parameters["output_layer.weight"] = vocabulary("lm_head.weight")
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


# Key of a safetensors file's metadata: the number of ranks that its weights are for.
TENSOR_PARALLEL = "tensor_parallel"


class Checkpoint:
    """The safetensors file, or the shards with their index, of a checkpoint folder. A context manager.

    extra: a safetensors file whose tensors, whole and under the checkpoint's names, take the place of its own.
    """

    def __init__(self, model_dir, extra=None):
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
        if extra is not None:
            path = str(Path(extra).resolve())  # which stays itself inside of any folder
            replaced = self._file(path).keys()
            if unknown := sorted(set(replaced) - set(self._file_of)):
                raise ValueError(f"{extra}: tensor {unknown[0]} is not one of the model in {self.folder}")
            self._file_of.update(dict.fromkeys(replaced, path))

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
            where = [slice(*part) for part in (piece.rows, piece.columns) if part is not None]
            return block[tuple(where)] if piece.index is None else block[(piece.index, *where)]
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
def load_weights(model, model_dir, config, share: Share, extra=None, layers: Container[int] | None = None) -> None:
    """Fills a rank's parameters of a built GPTModel from a checkpoint folder, cast to the parameters' dtype.

    extra: a safetensors file with weights that take the place of the folder's, such as `megatron-comp drop` writes.
    layers: fill only these, numbered from 0.

    Raises FileNotFoundError or ValueError, naming file and tensor, if the checkpoint is incomplete, damaged, of other
    shapes than the config says, or holds weights that the model has no place for.
    """
    parameters = dict(model.named_parameters())
    if extra is not None:
        check_extra(extra, share.tp)
    with Checkpoint(model_dir, extra) as checkpoint:
        fused = any(name.endswith("mlp.experts.gate_up_proj") for name in checkpoint.names)
        _check_names(checkpoint, config, fused)
        pieces_of = plan(config, share, fused)
        assert parameters.keys() == pieces_of.keys(), sorted(parameters.keys() ^ pieces_of.keys())
        for name, parameter in parameters.items():
            if layers is not None and _layer_of(name) not in layers:
                continue
            row = 0
            for piece in pieces_of[name]:
                block = checkpoint.read(piece)
                parameter[row : row + len(block)].copy_(block)
                row += len(block)
            parameter[row:].zero_()


def check_extra(path, tensor_parallel: int) -> dict[str, str]:
    """The metadata of a file of replaced weights. Raises ValueError if there is none, or for other numbers of ranks."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights {path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"weights {path} are no safetensors file: {error}") from None
    made_for = metadata.get(TENSOR_PARALLEL)
    if made_for is not None and made_for != str(tensor_parallel):
        raise ValueError(f"weights {path} are for {made_for} tensor-parallel ranks, not for {tensor_parallel}")
    return metadata


def _layer_of(parameter: str) -> int | None:
    """`decoder.layers.7.mlp...` is of layer 7, the embedding of none."""
    parts = parameter.split(".")
    return int(parts[2]) if parts[:2] == ["decoder", "layers"] else None


def _check_names(checkpoint: Checkpoint, config, fused_experts: bool) -> None:
    """A weight without a place, a bias for example, would be left out in silence and the output would be wrong."""
    known = {piece.tensor for pieces in plan(config, WHOLE, fused_experts).values() for piece in pieces}
    # Some files repeat the tied embeddings, and old ones carry the rotary frequencies that follow from the config.
    harmless = {name for name in checkpoint.names if name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")}
    unknown = sorted(checkpoint.names - known - harmless)
    if unknown:
        count, first = len(unknown), unknown[0]
        raise ValueError(f"{checkpoint.folder}: {count} tensors have no place in this model, the first is {first}")
