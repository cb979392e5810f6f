# SPDX-License-Identifier: Apache-2.0
"""Hugging Face Llama and Mixtral folders: the config, and the weights of one rank.

`shards.plan` says which rows and columns of which tensors make up each parameter of a rank; `load_weights` reads
exactly those. No process ever holds more of a checkpoint than its own share.
"""

from collections.abc import Container
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from ..layers.predictor_file import TENSOR_PARALLEL
from ..notices import notice
from . import model_files
from .config import check_sizes, read_raw, unknown_keys
from .metadata import read_metadata
from .shards import EMBEDDING, HEAD, WHOLE, Piece, Share, plan

FLOAT_TYPES = ("F16", "BF16", "F32", "F64")
CHUNK_ROWS = 4096  # of an embedding, that are compared at a time


def read_config(model_dir) -> PretrainedConfig:
    """The config of a checkpoint folder.

    Its `tie_word_embeddings` is what the weights say: false where they hold an output layer unlike the embedding,
    which transformers takes too. A line tells of that, and another of keys that are not known here.

    Raises FileNotFoundError or ValueError if the folder has no config, if the architecture is another one, or if a
    value is not supported. The message names file, key, value and what is allowed.
    """
    path = Path(model_dir) / "config.json"
    raw = read_raw(model_dir)
    if unknown := unknown_keys(raw, GenerationConfig().to_dict()):
        notice(f"{path}: unknown keys, which have no effect here: {', '.join(unknown)}")
    try:
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ValueError(f"{path} is not a valid {raw['model_type']} config: {error}") from None
    check_sizes(config, path)
    if config.tie_word_embeddings and _holds_own_head(Path(model_dir)):
        notice(f"{path}: tie_word_embeddings is true, but the weights hold another output layer, which is used")
        config.tie_word_embeddings = False
    return config


def _holds_own_head(folder: Path) -> bool:
    """Whether a folder's weights have an output layer that differs from the embedding."""
    if distributed := model_files.find_distributed(folder):
        return any(name.endswith("output_layer.weight") for name in read_metadata(distributed).state_dict_metadata)
    if not any(folder.glob("*.safetensors")):
        return False
    with Checkpoint(folder) as checkpoint:
        if not checkpoint.names >= {EMBEDDING, HEAD}:
            return False
        return not checkpoint.equal(EMBEDDING, HEAD)


class Checkpoint:
    """The safetensors file, or the shards with their index, of a checkpoint folder. A context manager.

    extra: a safetensors file whose tensors, whole and under the checkpoint's names, take the place of its own.
    """

    def __init__(self, model_dir, extra=None):
        self.folder = Path(model_dir)
        self._open = {}
        self._file_of = model_files.shards(self.folder)
        if self._file_of is None:
            self._file_of = dict.fromkeys(self._file(model_files.SINGLE).keys(), model_files.SINGLE)
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

    @property
    def has_fused_experts(self) -> bool:
        """Whether a mixture's experts are in tensors of three dimensions."""
        return any(name.endswith("mlp.experts.gate_up_proj") for name in self._file_of)

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
                raise ValueError(
                    f"{self.folder / file}: tensor {name} is of type {dtype}, expected one of {allowed}; quantized "
                    "weights are not supported"
                )
            where = [slice(*part) for part in (piece.rows, piece.columns) if part is not None]
            return block[tuple(where)] if piece.index is None else block[(piece.index, *where)]
        except SafetensorError as error:
            raise ValueError(f"{self.folder / file}: cannot read tensor {name} of shape {expected}: {error}") from None

    def equal(self, one: str, other: str) -> bool:
        """Whether two matrices are the same; no more than some rows of them are in memory at a time."""
        pair = [self._file(self._file_of[name]).get_slice(name) for name in (one, other)]
        rows = {tuple(block.get_shape()) for block in pair}
        if len(rows) > 1:
            return False
        starts = range(0, rows.pop()[0], CHUNK_ROWS)
        return all(torch.equal(*(block[start : start + CHUNK_ROWS] for block in pair)) for start in starts)

    def _file(self, name: str):
        if name not in self._open:
            path = self.folder / name
            model_files.check_safetensors(path)
            try:
                self._open[name] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged or incomplete ({path.stat().st_size} bytes): {error}") from None
        return self._open[name]


@torch.no_grad()
def load_weights(model, model_dir, config, share: Share, extra=None, layers: Container[int] | None = None) -> None:
    """Fills a rank's parameters of a built GPTModel from a checkpoint folder, cast to the parameters' dtype.

    extra: a safetensors file with weights that take the place of the folder's, such as `megatron-comp drop` writes.
    layers: fill only these, numbered from 0 over all stages.

    Raises FileNotFoundError or ValueError, naming file and tensor, if the checkpoint is incomplete, damaged, of other
    shapes than the config says, or holds weights that the model has no place for.
    """
    parameters = dict(model.named_parameters())
    if extra is not None:
        check_extra(extra, share.tp)
    with Checkpoint(model_dir, extra) as checkpoint:
        fused = checkpoint.has_fused_experts
        _check_names(checkpoint, config, fused)
        pieces_of = plan(config, share, fused)
        assert parameters.keys() == pieces_of.keys(), sorted(parameters.keys() ^ pieces_of.keys())
        if config.tie_word_embeddings and HEAD in checkpoint.names and EMBEDDING not in checkpoint.names:
            for word in pieces_of.keys() & {"embedding.word_embeddings.weight", "output_layer.weight"}:
                pieces_of[word] = [piece._replace(tensor=HEAD) for piece in pieces_of[word]]  # its other name
        for name, parameter in parameters.items():
            if layers is not None and _layer_of(name, share.layers(config.num_hidden_layers)) not in layers:
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


def _layer_of(parameter: str, of_stage: range) -> int | None:
    """`decoder.layers.7.mlp...` is of the stage's layer 7, the embedding of none."""
    parts = parameter.split(".")
    return of_stage[int(parts[2])] if parts[:2] == ["decoder", "layers"] else None


def _check_names(checkpoint: Checkpoint, config, fused_experts: bool) -> None:
    """A weight without a place, a bias for example, would be left out in silence and the output would be wrong."""
    known = {piece.tensor for pieces in plan(config, WHOLE, fused_experts).values() for piece in pieces}
    # Some files repeat the tied embeddings, and old ones carry the rotary frequencies that follow from the config.
    harmless = {name for name in checkpoint.names if name == HEAD or name.endswith("rotary_emb.inv_freq")}
    unknown = sorted(checkpoint.names - known - harmless)
    for name in unknown:
        if method := model_files.quantized_by(name):
            raise ValueError(f"{checkpoint.folder}: tensor {name}: {model_files.quantized(method)}")
    if unknown:
        count, first = len(unknown), unknown[0]
        raise ValueError(f"{checkpoint.folder}: {count} tensors have no place in this model, the first is {first}")
