"""Reads the `.metadata` of a distributed checkpoint, which is a pickle, without running anything that it names."""

import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata

# By their full names: a module would lend everything that it imports, `os.system` among it.
ALLOWED = {
    *(("pathlib", name) for name in ("Path", "PurePath", "PosixPath", "PurePosixPath")),
    *(("pathlib._local", name) for name in ("Path", "PurePath", "PosixPath", "PurePosixPath")),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint's metadata needs; it was not run")


def load_metadata(path: str | Path) -> Metadata:
    """Raises UnpicklingError for a file that names anything but the parts of a checkpoint's metadata, or is damaged."""
    with open(path, "rb") as file:
        try:
            content = _Unpickler(file).load()
        except (pickle.UnpicklingError, OSError, EOFError):
            raise
        except Exception as error:  # a damaged pickle may raise anything
            raise pickle.UnpicklingError(f"{Path(path).name} is damaged: {error!r}") from None
    if not isinstance(content, Metadata):
        raise pickle.UnpicklingError(f"{Path(path).name} holds a {type(content).__name__}, not a checkpoint's metadata")
    return content
