# SPDX-License-Identifier: Apache-2.0
"""Megatron's distributed checkpoints (`torch_dist`): a model's weights written once, read at any tensor-parallel size.

What lies in one, as Megatron's own `dist_checkpointing.save` of `model.sharded_state_dict()` writes it:
`metadata.json`, which comes last and so says that the rest is whole; `.metadata`, which says where each block of each
tensor lies; and `.distcp` files, of one or more a rank. Tensors go by the names of the whole model, so a dictionary
around them (training saves the model's under `model`) leaves no trace. Training's folder holds one such folder an
iteration, and a file that names the latest.

A compressed model's tensors, names and extra state are the stock model's, so it reads and writes what stock Megatron
writes and reads.
"""

from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.models.gpt.gpt_model import GPTModel
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from tqdm import tqdm

from . import model_files
from .metadata import check_storage, read_metadata

EMBEDDING = "embedding.word_embeddings.weight"

# What training keeps besides tensors: a file or, from Megatron 0.19 on, an entry of this name among the tensors.
COMMON, COMMON_ENTRY = "common.pt", "common_state/"

# Names of one norm: alone, as experts and Megatron's own layers have it, or fused into the linear that follows it.
NORMS = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
)


class _SaveInThisProcess(TorchDistSaveShardedStrategy):
    """Megatron's strategy with torch's writer. Megatron's own starts processes to write and one to collect what they
    say; the latter outlives a rank that is killed, and none of them can be started from a daemon."""

    def save(self, sharded_state_dict, checkpoint_dir) -> None:
        tensors, *_ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        with tqdm(desc="write", unit=" tensors", disable=True if dist.get_rank() else None) as bar:
            dcp.save(
                mcore_to_pyt_state_dict(tensors),
                storage_writer=dcp.FileSystemWriter(checkpoint_dir),
                planner=_SavePlanner(bar, flatten_state_dict=False),
            )


class _SavePlanner(MCoreSavePlanner):
    """Megatron's planner, showing how many tensors of this rank are written."""

    def __init__(self, bar: tqdm, **options):
        super().__init__(**options)
        self.bar = bar

    def finish_plan(self, new_plan):
        self.bar.reset(total=len(new_plan.items))
        return super().finish_plan(new_plan)

    def resolve_data(self, write_item):
        self.bar.update()
        return super().resolve_data(write_item)


def save(model: GPTModel, folder, **common) -> None:
    """Writes the model, compressed or not, to a folder that all ranks share; every rank calls this.

    common: what a checkpoint holds besides tensors, by its name there. An existing folder must be empty.

    Raises ValueError if it is not.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not empty")
    dist.barrier()  # nobody looks after somebody has begun
    folder.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(
        {"model": model.sharded_state_dict(), **common}, str(folder), _SaveInThisProcess("torch_dist", 1)
    )


@torch.no_grad()
def load(model: GPTModel, folder, vocab_size: int = 0) -> None:
    """Fills the model, compressed or not, from a folder that `find` found; every rank calls this.

    Tensors are cast to the model's dtype. What training keeps beside weights (optimizer, schedule) is not read.
    Entries that only pad a vocabulary may differ in number; those that the checkpoint lacks become zeros. vocab_size:
    entries that are no padding, which it must have.

    Nothing in the folder is run. Torch and Megatron unpickle `.metadata`, `common.pt`, and every entry that is
    described as anything but a tensor: the files are looked at first, and no such entry is asked for. Extra state
    (Transformer Engine's, for fp8) is such an entry; it is left as the model has it.

    Raises ValueError, naming a tensor, if the checkpoint and the model do not have the same, in the same shapes, or if
    the checkpoint cannot be read.
    """
    if any(Path(folder).glob("__*.metadata")):
        # Torch would turn to these, unread by us, if it could not go by `.metadata`.
        raise ValueError(f"{folder} describes the parts of single ranks (__*.metadata), which are not read here")
    try:
        model_files.check_distributed(Path(folder))
        description = read_metadata(folder)
        check_storage(folder, description)
    except OSError as error:
        raise ValueError(str(error)) from None
    described = description.state_dict_metadata
    names = described.keys()
    with _reading(folder):
        _check_common(Path(folder), described)
        metadata = dist_checkpointing.load_content_metadata(str(folder))
    prefix = _prefix(names, folder)
    sharded = model.sharded_state_dict(prefix=prefix, metadata=metadata)
    sharded = {name: entry for name, entry in sharded.items() if "_extra_state" not in name}
    _rename_norms(sharded, names)
    asked = _keys(sharded)
    _check(folder, "tensors of this model are missing in the checkpoint", asked - names)
    odd = {name for name in asked if not isinstance(described[name], TensorStorageMetadata)}
    _check(folder, "tensors of this model are no tensors in the checkpoint", odd)
    entries = described[f"{prefix}{EMBEDDING}"].size[0]
    if entries < vocab_size:
        raise ValueError(f"{folder}: its vocabulary has {entries} entries, the model's {vocab_size}: of another model?")
    with _reading(folder):
        loaded, unread, _ = dist_checkpointing.load({"model": sharded}, str(folder), strict=StrictHandling.RETURN_ALL)
    parts = tuple(f"{prefix}{name}." for name, _ in model.named_children())
    _check(folder, "tensors have no place in this model", {name for name in unread if name.startswith(parts)})
    state = {name.removeprefix(prefix): value for name, value in loaded["model"].items()}
    model.load_state_dict(state, strict=False)  # extra state may be absent; all else was checked


class _LooksAtBytes(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item, value) -> None:
        torch.load(value, map_location="cpu", weights_only=True)


def _check_common(folder: Path, described) -> None:
    """Raises UnpicklingError, or torch's error around it, if what stands beside the tensors names code to be run, and
    ValueError if it is missing or damaged.

    Megatron reads it for every checkpoint, and torch then runs what it names: an entry always, and the file if
    TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set.
    """
    entries = {name: BytesIO() for name in described if name.startswith(COMMON_ENTRY)}
    if (common := folder / COMMON).exists():
        try:
            torch.load(common, map_location="cpu", weights_only=True)
        except RuntimeError:  # of a file that is no zip archive
            raise ValueError(f"{COMMON} is damaged or incomplete ({common.stat().st_size} bytes)") from None
    elif not entries:
        raise ValueError(f"{COMMON} is missing")
    if entries:
        planner = _LooksAtBytes(flatten_state_dict=False)
        dcp.load(entries, storage_reader=dcp.FileSystemReader(folder), planner=planner, no_dist=True)


def _prefix(names, folder) -> str:
    """What stands before the model's own names: nothing, or `module.` where a wrapper of the model was saved."""
    found = [name.removesuffix(EMBEDDING) for name in names if name.endswith(EMBEDDING)]
    if not found:
        raise ValueError(f"{folder} holds no {EMBEDDING}: expected the checkpoint of a GPTModel")
    return min(found, key=len)  # an optimizer's states have longer ones


def _rename_norms(sharded, names) -> None:
    """Asks for each norm by the name that the checkpoint has it under."""
    for tensor in sharded.values():
        for pair in NORMS:
            for ours, theirs in (pair, pair[::-1]):
                other = tensor.key.replace(ours, theirs)
                if tensor.key not in names and other in names:
                    tensor.key = other


def _keys(sharded) -> set[str]:
    """Names in a checkpoint of everything in a sharded state dict."""
    keys = set()
    for entry in sharded.values():
        parts = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
        keys |= {part.key for part in parts}
    return keys


def _check(folder, problem: str, names: set[str]) -> None:
    if names := sorted(name for name in names if "_extra_state" not in name):
        raise ValueError(f"{folder}: {len(names)} {problem}, the first is {names[0]}")


@contextmanager
def _reading(folder):
    """Makes a ValueError of what Megatron and torch raise for a checkpoint that does not fit or is damaged."""
    try:
        yield
    except (CheckpointingException, CheckpointException, OSError, EOFError, UnpicklingError, ValueError) as error:
        if isinstance(error, CheckpointException):  # all ranks' tracebacks: the first that failed will do
            error = next(iter(error.failures.values()))[0]
        cause = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnpicklingError):  # torch's own words advise to run what is there
            cause = "cannot be read: an entry is damaged, or asks to run code"
        elif not isinstance(error, CheckpointingException):
            cause = f"cannot be read: {cause}"
        raise ValueError(f"{folder}: {cause}") from None
