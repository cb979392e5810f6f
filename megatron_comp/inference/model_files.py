# SPDX-License-Identifier: Apache-2.0
"""The files of a model's folder: which there must be, and whether each is what its name says. Reads headers at most."""

import importlib.util
import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path

from ..files import read_json, shown

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

# Weights that other programs read, by what their names end in.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".ckpt", ".h5", ".msgpack", ".safetensors")

# What the names of tensors that only quantized weights have end in.
QUANTIZED = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".scales": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    ".weight_packed": "compressed-tensors",
    ".weight_shape": "compressed-tensors",
    ".weight_zero_point": "compressed-tensors",
    ".weight_scale_2": "modelopt",
    ".weight_scale_inv": "fp8",
    ".weight_scale": "fp8 or compressed-tensors",
    ".input_scale": "fp8 or compressed-tensors",
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".weight_format": "bitsandbytes",
    "_blocks": "mxfp4",
    "_scales": "mxfp4",
}

# Files that a tokenizer is made from; one is enough.
SENTENCEPIECE = "tokenizer.model"
TOKENIZERS = ("tokenizer.json", SENTENCEPIECE, "vocab.json")
READERS = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # packages and modules, for SENTENCEPIECE

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # Megatron's word for weights that belong to no iteration, in the tracker and as the folder's name
COMPLETE = "metadata.json"


def check_file(path: Path) -> None:
    """Raises FileNotFoundError or ValueError for a file that is missing, or is only a stand-in of one."""
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(
            f"{path} is a link to a file that is not there ({path.readlink()}): a download that did not end? "
            "Fetch the model again"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path} is a pointer of git-lfs, not the file itself: run `git lfs pull` in its folder")


def check_safetensors(path: Path) -> dict[str, dict]:
    """The header: each tensor's type, shape and place. Raises FileNotFoundError or ValueError for a file that is
    missing, cut short, or no safetensors."""
    check_file(path)
    size = path.stat().st_size
    damaged = ValueError(f"{path} is damaged or incomplete ({size} bytes)")
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise damaged
        try:
            tensors = json.loads(file.read(length))
            end = max((t["data_offsets"][1] for name, t in tensors.items() if name != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise damaged from None
    if end != size - 8 - length:
        raise damaged
    return {name: tensor for name, tensor in tensors.items() if name != "__metadata__"}


def quantized_by(tensor: str) -> str | None:
    """The method that a tensor's name belongs to; None for a name of plain weights."""
    return next((method for ending, method in QUANTIZED.items() if tensor.endswith(ending)), None)


def shards(folder: Path) -> dict[str, str] | None:
    """The index of a folder of shards: the file of each tensor. None where there is a single file.

    Raises FileNotFoundError or ValueError if both are missing, or if the index is not a valid one.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() or single.is_symlink():
        check_file(single)
        return None
    if not (index.is_file() or index.is_symlink()):
        others = sorted(file.name for file in folder.iterdir() if file.suffix in OTHER_WEIGHTS)
        found = f"; {others[0]} is not read" if others else ""
        raise FileNotFoundError(f"{folder} holds neither {SINGLE} nor {INDEX}{found}")
    check_file(index)
    content = read_json(index, "index")
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index} is not an index of safetensors shards: it has no weight_map of tensors and files")
    for tensor, file in files.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index} is not an index of safetensors shards: {shown(tensor)} is in {shown(file)}")
    return files


def quantized(by: object) -> str:
    """Why weights quantized by a method are refused. by: the method's name, or the object that describes it."""
    if isinstance(by, Mapping):
        kind = [name for name in ("load_in_4bit", "load_in_8bit") if by.get(name)]
        by = by.get("quant_method") or by.get("quant_algo") or by.get("format") or (kind and "bitsandbytes")
        by = f"{by} ({kind[0]})" if kind else by
    return f"the weights are quantized by {by or 'an unnamed method'}; only weights in 16, 32 or 64 bits are supported"


def find_distributed(folder: str | Path) -> Path | None:
    """Megatron's distributed checkpoint in `folder`: itself, or the iteration that a training's folder names as latest.

    None if the folder is neither, and where safetensors lie in it: those are its weights then, whatever else is there,
    as hidden files are that nobody sees. Raises ValueError for a checkpoint that is not complete or of another format.
    """
    folder = Path(folder)
    if any(folder.glob("*.safetensors")):
        return None
    tracker = folder / TRACKER
    if tracker.is_file():
        word = tracker.read_text(errors="replace").strip()
        if word != RELEASE and not re.fullmatch("[0-9]{1,18}", word):
            raise ValueError(f"{tracker} says {shown(word)}; expected an iteration's number or {RELEASE!r}")
        folder /= word if word == RELEASE else f"iter_{int(word):07d}"
    elif not (folder / ".metadata").is_file():
        return None
    for name in (".metadata", COMPLETE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing: expected a complete checkpoint of the format torch_dist")
    return folder


def check_read_by_layer(folder: str | Path) -> None:
    """Raises ValueError for a checkpoint of Megatron's: only Hugging Face's are read layer by layer."""
    if find_distributed(folder):
        raise ValueError(
            f"{folder} is a checkpoint of Megatron's, whose layers are not read one by one: give the one of Hugging "
            "Face's that it was made from"
        )


def check_distributed(folder: Path) -> None:
    """The files of a checkpoint that `find_distributed` found, as far as their names tell what they are. Raises
    FileNotFoundError or ValueError that names one which is missing, empty or something else."""
    said = read_json(folder / COMPLETE, "checkpoint's description")
    if (kind := said.get("sharded_backend") if isinstance(said, dict) else None) != "torch_dist":
        raise ValueError(f"{folder / COMPLETE}: sharded_backend is {shown(kind)}; allowed: 'torch_dist'")
    for path in sorted([folder / ".metadata", *folder.glob("common.pt"), *folder.glob("*.distcp")]):
        check_file(path)
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty")


def check_weights(folder: Path) -> dict[str, tuple[Path, list[int]]]:
    """Of each tensor in safetensors its file and shape; nothing of Megatron's checkpoints.

    Raises FileNotFoundError or ValueError, naming a file, if weights are missing, cut short or quantized.
    """
    if distributed := find_distributed(folder):
        check_distributed(distributed)
        return {}
    files, found = shards(folder), {}
    for name in sorted({SINGLE} if files is None else set(files.values())):
        for tensor, header in check_safetensors(folder / name).items():
            if method := quantized_by(tensor):
                raise ValueError(f"{folder / name}: tensor {tensor}: {quantized(method)}")
            found[tensor] = folder / name, header.get("shape")
    return found


def check_tokenizer(folder: Path) -> None:
    """Raises FileNotFoundError or ValueError if there is no tokenizer, or one that cannot be read here."""
    found = [name for name in TOKENIZERS if (folder / name).is_file() or (folder / name).is_symlink()]
    if not found:
        raise FileNotFoundError(f"{folder} holds no tokenizer: expected one of {', '.join(TOKENIZERS)}")
    for name in found:
        check_file(folder / name)
    if TOKENIZERS[0] in found:
        content = read_json(folder / TOKENIZERS[0], "tokenizer")
        if not isinstance(content, dict) or "model" not in content:
            raise ValueError(f"{folder / TOKENIZERS[0]} is not a tokenizer: it has no model")
    if (settings := folder / "tokenizer_config.json").is_file():
        read_json(settings, "tokenizer's settings")
    if sentencepiece_alone(folder) and (missing := [name for name, module in READERS.items() if not _there(module)]):
        raise ValueError(
            f"{folder / SENTENCEPIECE} is a sentencepiece file, and {' and '.join(missing)} cannot be imported: "
            f"pip install {' '.join(READERS)}"
        )


def sentencepiece_alone(folder: Path) -> bool:
    """Whether a sentencepiece file is all there is of a tokenizer. Llama 3's file of that name is tiktoken's: text."""
    path = folder / SENTENCEPIECE
    if (folder / "tokenizer.json").is_file() or not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(1) == b"\n"  # a protobuf's first field


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent
        return False
