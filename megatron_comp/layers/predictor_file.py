# SPDX-License-Identifier: Apache-2.0
"""Files of predictors: a regression of each sum, for one number of tensor-parallel ranks.

`layers.5.mlp.down`, `.mean`, `.up` and `.bias` are the regression of layer 5's MLP; its metadata says the ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.functional import linear

TENSOR_PARALLEL = "tensor_parallel"  # key of a file's metadata: the number of ranks that it is for
MADE_BY = "made_by"  # key of what its content depends on, as JSON
EPSILON = 1e-5

Sum = tuple[int, str]  # layer and site


class Regression(NamedTuple):
    """Of one sum, for all ranks: down `[hidden, k]`, mean `[k]`, up `[ranks, k, hidden]`, bias `[ranks, hidden]`.

    Columns of `down` explain less and less. The first of them, with theirs of the others, are one of a smaller rank.
    """

    down: torch.Tensor
    mean: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor

    def partial_sums(self, x: torch.Tensor) -> torch.Tensor:
        """Each rank's predicted partial sum `[ranks, ..., hidden]`, of a block's input `[..., hidden]`."""
        small = normalized(x) @ self.down - self.mean
        return torch.stack([linear(small, up.t(), bias) for up, bias in zip(self.up, self.bias, strict=True)])

    def cut(self, k: int) -> "Regression":
        """Of rank k."""
        return Regression(self.down[:, :k], self.mean[:k], self.up[:, :k], self.bias)

    def to(self, like: torch.Tensor | torch.dtype) -> "Regression":
        return Regression(*(part.to(like) for part in self))

    def named(self, where: Sum) -> dict[str, torch.Tensor]:
        """By their names in a file."""
        return {f"{name(*where)}.{part}": tensor for part, tensor in self._asdict().items()}


def normalized(x: torch.Tensor) -> torch.Tensor:
    """Each token `[..., hidden]` over its root mean square, in the type of `x`."""
    # One pass without a copy: half of the time that the mean of x.square() takes.
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (x * torch.rsqrt(size.square() / x.shape[-1] + EPSILON)).to(x.dtype)


def read_regressions(path: str | Path, ranks: int, hidden: int | None = None) -> dict[Sum, Regression]:
    """All of a file, in order of layers. hidden: values per token; None for as many as the file has.

    Raises OSError or ValueError for a file that is damaged, or not of this number of ranks or values per token.
    """
    with _opened(path, ranks) as file:
        tensors = {tensor: file.get_tensor(tensor) for tensor in file.keys()}  # noqa: SIM118 - not a dictionary
    made = {}
    for where in sorted({_where(tensor, path) for tensor in tensors}):
        names = [f"{name(*where)}.{part}" for part in Regression._fields]
        down = tensors.get(names[0])
        rows, k = down.shape if down is not None and down.dim() == 2 else (0, 0)
        hidden = hidden or rows
        for key, shape in zip(names, ((hidden, k), (k,), (ranks, k, hidden), (ranks, hidden)), strict=True):
            if key not in tensors or tuple(tensors[key].shape) != shape:
                said = f"has shape {list(tensors[key].shape)}" if key in tensors else "is missing"
                raise ValueError(f"predictor {path}: {key} {said}, expected {list(shape)}")
        made[where] = Regression(*(tensors[key] for key in names))
    return made


def inner_sizes(path: str | Path, ranks: int, hidden: int) -> list[int]:
    """k of each sum's regression, without reading weights. Raises as `read_regressions` does."""
    with _opened(path, ranks) as file:
        shapes = {each: file.get_slice(each).get_shape() for each in file.keys() if each.endswith(".down")}  # noqa: SIM118
    for tensor, shape in shapes.items():
        if len(shape) != 2 or shape[0] != hidden:
            raise ValueError(f"predictor {path}: {tensor} has shape {shape}; the model has {hidden} values per token")
    return [k for _, k in shapes.values()]


def read_metadata(path: str | Path) -> dict[str, str]:
    """Raises ValueError for a file that is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"predictor {path} is not a valid safetensors file: {error}") from None


def name(layer: int, site: str) -> str:
    """Of a sum's tensors, before `.down`, `.mean`, `.up` and `.bias`."""
    return f"layers.{layer}.{site}"


@contextmanager
def _opened(path: str | Path, ranks: int) -> Iterator[safe_open]:
    made_for = read_metadata(path).get(TENSOR_PARALLEL)
    if made_for != str(ranks):
        raise ValueError(f"predictor {path} is for {made_for or 'an unknown number of'} ranks, not for {ranks}")
    with safe_open(path, framework="pt") as file:
        yield file


def _where(tensor: str, path: str | Path) -> Sum:
    words = tensor.split(".")
    if len(words) != 4 or words[0] != "layers" or not words[1].isdecimal() or words[3] not in Regression._fields:
        raise ValueError(f"predictor {path}: {tensor} is not the name of a predictor's tensor")
    return int(words[1]), words[2]
