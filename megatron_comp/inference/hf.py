"""Hugging Face Llama and Mixtral folders: the config, and the weights of one rank.

`shards.plan` says which rows and columns of which tensors make up each parameter of a rank; `load_weights` reads
exactly those. No process ever holds more of a checkpoint than its own share.
"""

from collections.abc import Container
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig

from ..files import read_json, shown
from .shards import WHOLE, Piece, Share, plan

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
    raw = read_json(path, "config")
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds no JSON object")
    model_type, architectures = raw.get("model_type"), raw.get("architectures") or []
    expected = ARCHITECTURES.get(model_type)
    if expected is None or (architectures and expected not in architectures):
        allowed = ", ".join(f"{a} (model_type {t})" for t, a in ARCHITECTURES.items())
        given = f"{', '.join(architectures) or 'no architecture'} (model_type {model_type})"
        raise ValueError(f"{path}: {given} is not supported; allowed: {allowed}")
    try:
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
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
            self._file_of = _read_index(index)
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


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor. Raises ValueError if the index says anything else."""
    try:
        files = read_json(path, "index")["weight_map"]
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise ValueError(f"expected a weight_map of names of files by names of tensors, not {shown(files)}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an index of safetensors shards: {error!r}") from None
    return files


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
