# SPDX-License-Identifier: Apache-2.0
"""Reads the `.metadata` of a distributed checkpoint without running what it names.

torch writes that file with pickle, and reads it with `pickle.load`, which calls whatever the file asks for. A model
folder is data from elsewhere: here only the classes that describe tensors and where they lie can be named.
"""

import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata

from .model_files import check_file

# By module: every class or function that torch's own `.metadata` names, for all versions supported.
ALLOWED = {
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path"},
    "pathlib._local": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path"},  # Python 3.13
    "collections": {"OrderedDict"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    # Training's checkpoints keep the plan that they were written by.
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
}


def check_storage(folder: str | Path, metadata: Metadata) -> None:
    """Raises FileNotFoundError or ValueError that names a file of tensors which is missing or too short."""
    ends: dict[str, int] = {}
    try:
        for place in metadata.storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    except (AttributeError, TypeError):
        raise ValueError(
            f"{Path(folder, '.metadata')} is not the description of a checkpoint: places are wrong"
        ) from None
    for name, end in ends.items():
        check_file(path := Path(folder, name))
        if (size := path.stat().st_size) < end:
            raise ValueError(f"{path} is damaged or incomplete ({size} bytes, {end} are described)")


class _DescriptionsOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        # A name with dots would reach through a module into those that it imports; none of the allowed ones has any.
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no description of tensors needs")


def read_metadata(folder: str | Path) -> Metadata:
    """What a checkpoint's `.metadata` says. Raises ValueError, naming the file, for anything but such a description."""
    path = Path(folder, ".metadata")
    try:
        with open(path, "rb") as file:
            metadata = _DescriptionsOnly(file).load()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise ValueError(f"{path} is not the description of a checkpoint: {error}") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise ValueError(f"{path} is not the description of a checkpoint: it holds a {type(metadata).__name__}")
    return metadata
