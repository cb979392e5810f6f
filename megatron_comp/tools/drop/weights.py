"""Files of blocks' weights that take the place of a checkpoint's: read, and written block by block."""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ...inference.hf import TENSOR_PARALLEL, check_extra

HOW = "made_by"


class WeightsFile:
    """Whole tensors under the checkpoint's names, and in the metadata what they were made by.

    An interruption leaves the file as it was or as it will be: every finished block is in it, and none twice.

    how: by which weights were made, equal for all blocks; a file that was made otherwise is refused with ValueError.
    """

    def __init__(self, path: str, ranks: int, how: dict) -> None:
        self.path, self.ranks, self.how = Path(path), ranks, json.dumps(how, sort_keys=True)
        self.tensors: dict[str, torch.Tensor] = {}
        self.rows: dict[str, dict] = {}
        if not self.path.exists():
            return
        metadata = check_extra(path, ranks)
        if (made_by := metadata.get(HOW)) != self.how:
            raise ValueError(
                f"{path} is there already, made by {made_by}, not by {self.how}: name another, or remove it"
            )
        self.tensors, self.rows = load_file(path), json.loads(metadata["rows"])

    def __contains__(self, block: int) -> bool:
        return str(block) in self.rows

    def add(self, block: int, tensors: dict[str, torch.Tensor], row: dict) -> None:
        """row: what is to be known of this block, as JSON."""
        self.tensors |= tensors
        self.rows[str(block)] = row
        metadata = {TENSOR_PARALLEL: str(self.ranks), HOW: self.how, "rows": json.dumps(self.rows), "format": "pt"}
        partial = self.path.with_name(self.path.name + ".partial")
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, partial, metadata=metadata)
        os.replace(partial, self.path)


def blocks_in(path: str) -> set[int]:
    """The numbers of the layers that a file of weights has a tensor of."""
    with safe_open(path, framework="pt") as file:
        return {int(name.split(".")[2]) for name in file.keys()}  # noqa: SIM118 - not a dictionary
