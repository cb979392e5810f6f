# SPDX-License-Identifier: Apache-2.0
"""Files of blocks' weights that take the place of a checkpoint's: read, and written block by block."""

import json
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .. import files
from ..inference.hf import check_extra, read_config
from ..inference.weight_overrides import block_of
from ..layers.predictor_file import MADE_BY, TENSOR_PARALLEL
from .block import check_split
from .blocks import check_blocks


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
        if (made_by := metadata.get(MADE_BY)) != self.how:
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
        metadata = {TENSOR_PARALLEL: str(self.ranks), MADE_BY: self.how, "rows": json.dumps(self.rows), "format": "pt"}
        replace_file(self.path, self.tensors, metadata)


def begin(
    model: str, ranks: int, out: str, blocks: Collection[int], how: dict
) -> tuple[object, WeightsFile, list[int]]:
    """What a step that writes weights starts from: the model's config, the file, and the blocks that are not in it.

    Raises ValueError for blocks that the model does not have, and what `check_split` and `WeightsFile` raise.
    """
    config = read_config(model)
    check_split(config, ranks)
    check_blocks(blocks, config)
    file = WeightsFile(out, ranks, how)
    return config, file, [block for block in blocks if block not in file]


def write_blocks(path: str, blocks: Collection[int], out: str) -> None:
    """The tensors of these blocks, and what is known of them, in a file of their own."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        names = [name for name in file.keys() if block_of(name, path) in blocks]  # noqa: SIM118
        tensors = {name: file.get_tensor(name) for name in names}
    rows = json.loads(metadata.get("rows", "{}"))
    metadata["rows"] = json.dumps({block: row for block, row in rows.items() if int(block) in blocks})
    replace_file(out, tensors, metadata)


def replace_file(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """An interruption leaves the file as it was or as it will be."""
    with files.replacing(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
