# SPDX-License-Identifier: Apache-2.0
"""Weights of a file in the place of a built model's own."""

import json
from collections.abc import Collection

import torch
from safetensors import safe_open

from ..files import digest
from ..layers.apply import remove_compression
from ..layers.predictor_file import MADE_BY
from ..policy import CompressionPolicy
from .hf import check_extra
from .model import reload_layers
from .model_files import check_read_by_layer


def blocks_in(path: str) -> set[int]:
    """The numbers of the layers that a file of weights has a tensor of. Raises ValueError for tensors of no layer."""
    with safe_open(path, framework="pt") as file:
        return {block_of(name, path) for name in file.keys()}  # noqa: SIM118 - not a dictionary


def block_of(name: str, path: str) -> int:
    words = name.split(".")
    if words[:2] != ["model", "layers"] or not words[2].isdecimal():
        raise ValueError(f"weights {path}: {name} is of no layer")
    return int(words[2])


class WeightOverrides:
    """A file's weights in blocks of a built model, and the model's own in them again.

    blocks: of the file. Raises ValueError for a file of another number of ranks or with tensors of no layer, and for a
    model of a Megatron checkpoint, whose blocks are not read one by one.
    """

    def __init__(self, model: torch.nn.Module, model_dir: str, path: str) -> None:
        check_read_by_layer(model_dir)
        metadata = check_extra(path, model.config.tensor_model_parallel_size)
        self.predictor = json.loads(metadata.get(MADE_BY, "{}")).get("predictor")
        self.model, self.model_dir, self.path, self.blocks = model, model_dir, path, blocks_in(path)
        self._used: set[int] = set()

    @classmethod
    def for_policies(cls, model: torch.nn.Module, model_dir: str, path: str, policies: Collection[CompressionPolicy]):
        """Raises ValueError also if none of the policies drops the sum of a block of which there are weights, and what
        `check_predictor` raises."""
        made = cls(model, model_dir, path)
        for policy in policies:
            if made.blocks_for(policy):
                made.check_predictor(policy.predictor)
        if not any(made.blocks_for(policy) for policy in policies):
            raise ValueError(
                f"--weights {path}: for blocks without attention's sum, and no --policy drops that of one of them "
                f"({', '.join(map(str, sorted(made.blocks)))})"
            )
        return made

    def check_predictor(self, predictor: str | None) -> None:
        """Raises ValueError for weights that were distilled with another predictor than that of a policy."""
        if self.predictor and (not predictor or digest(predictor) != self.predictor):
            given = f"with {predictor} (digest {digest(predictor)})" if predictor else "without a predictor"
            raise ValueError(
                f"weights {self.path} were distilled with a predictor (digest {self.predictor}) and run {given}; "
                "name the same predictor file"
            )

    def blocks_for(self, policy: CompressionPolicy) -> set[int]:
        """Those of the file whose sum a policy drops: elsewhere its weights are wrong."""
        return {block for block in self.blocks if policy.drops(block)}

    def use(self, blocks: Collection[int] = ()) -> None:
        """The file's weights in these blocks and in no others. Takes compression away if that changes anything."""
        back, new = self._used - set(blocks), set(blocks) - self._used
        if not (back or new):
            return
        remove_compression(self.model)
        if back:
            reload_layers(self.model, self.model_dir, back)
        if new:
            reload_layers(self.model, self.model_dir, new, self.path)
        self._used = set(blocks)
