# SPDX-License-Identifier: Apache-2.0
"""Files of predictors: a regression of each sum, for one number of tensor-parallel ranks.

`layers.5.mlp.down`, `.mean`, `.up` and `.bias` are the regression of layer 5's MLP; its metadata says the ranks. Beside
that of attention may stand `layers.5.attention.response_down`, `.response_up` and `.response_bias`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.functional import linear

TENSOR_PARALLEL = "tensor_parallel"  # key of a file's metadata: the number of ranks that it is for
MADE_BY = "made_by"  # key of what its content depends on, as JSON
EPSILON = 1e-5
PARTS = ("down", "mean", "up", "bias")
RESPONSE_PARTS = ("response_down", "response_up", "response_bias")

Sum = tuple[int, str]  # layer and site


class Response(NamedTuple):
    """Of a layer's MLP to a rank's residual of attention's sum: down `[hidden, k]`, up `[k, hidden]`, bias `[hidden]`.

    Where that sum is dropped, the other ranks' parts of the MLP do not see the residual. The response is what they
    would make of it, as a linear map of low rank, the same on all ranks. bias: what the layer's sum lacks on average.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor

    def added_to(self, rest: torch.Tensor) -> torch.Tensor:
        """A residual `[..., hidden]`, and the response to it, without the bias."""
        flat = rest.reshape(-1, rest.shape[-1])
        return torch.addmm(flat, flat @ self.down, self.up).view_as(rest)

    def to(self, like: torch.Tensor | torch.dtype) -> "Response":
        return Response(*(part.to(like) for part in self))


class Regression(NamedTuple):
    """Of one sum, for all ranks: down `[hidden, k]`, mean `[k]`, up `[ranks, k, hidden]`, bias `[ranks, hidden]`.

    Columns of `down` explain less and less. The first of them, with theirs of the others, are one of a smaller rank.
    response: of attention's sum alone, to what this predictor leaves of it.
    """

    down: torch.Tensor
    mean: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor
    response: Response | None = None

    def partial_sums(self, x: torch.Tensor) -> torch.Tensor:
        """Each rank's predicted partial sum `[ranks, ..., hidden]`, of a block's input `[..., hidden]`."""
        small = normalized(x) @ self.down - self.mean
        return torch.stack([linear(small, up.t(), bias) for up, bias in zip(self.up, self.bias, strict=True)])

    def cut(self, k: int) -> "Regression":
        """Of rank k."""
        return self._replace(down=self.down[:, :k], mean=self.mean[:k], up=self.up[:, :k])

    def to(self, like: torch.Tensor | torch.dtype) -> "Regression":
        down, mean, up, bias = (part.to(like) for part in self[:4])
        return Regression(down, mean, up, bias, self.response and self.response.to(like))

    def named(self, where: Sum) -> dict[str, torch.Tensor]:
        """By their names in a file."""
        parts = dict(zip(PARTS, self[:4], strict=True)) | dict(zip(RESPONSE_PARTS, self.response or (), strict=False))
        return {f"{name(*where)}.{part}": tensor for part, tensor in parts.items()}


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

    def read(where: Sum, parts: Sequence[str], *shapes: tuple[int, ...]) -> list[torch.Tensor]:
        """Parts of a regression, which must have these shapes."""
        for part, shape in zip(parts, shapes, strict=True):
            found = tensors.get(key := f"{name(*where)}.{part}")
            if found is None or tuple(found.shape) != shape:
                said = "is missing" if found is None else f"has shape {list(found.shape)}"
                raise ValueError(f"predictor {path}: {key} {said}, expected {list(shape)}")
        return [tensors[f"{name(*where)}.{part}"] for part in parts]

    def size(where: Sum, part: str) -> tuple[int, int]:
        down = tensors.get(f"{name(*where)}.{part}")
        return tuple(down.shape) if down is not None and down.dim() == 2 else (0, 0)

    made = {}
    for where in sorted({_where(tensor, path) for tensor in tensors}):
        rows, k = size(where, "down")
        hidden = hidden or rows
        down, mean, up, bias = read(where, PARTS, (hidden, k), (k,), (ranks, k, hidden), (ranks, hidden))
        response = None
        if any(f"{name(*where)}.{part}" in tensors for part in RESPONSE_PARTS):
            _, k = size(where, RESPONSE_PARTS[0])
            response = Response(*read(where, RESPONSE_PARTS, (hidden, k), (k, hidden), (hidden,)))
        made[where] = Regression(down, mean, up, bias, response)
    return made


def inner_sizes(path: str | Path, ranks: int, hidden: int) -> tuple[list[int], dict[int, int]]:
    """k of each sum's regression, and by layer of its response, without reading weights.

    Raises as `read_regressions` does.
    """
    ends = (f".{PARTS[0]}", f".{RESPONSE_PARTS[0]}")
    with _opened(path, ranks) as file:
        shapes = {each: file.get_slice(each).get_shape() for each in file.keys() if each.endswith(ends)}  # noqa: SIM118
    for tensor, shape in shapes.items():
        if len(shape) != 2 or shape[0] != hidden:
            raise ValueError(f"predictor {path}: {tensor} has shape {shape}; the model has {hidden} values per token")
    responses = {_where(tensor, path)[0]: k for tensor, (_, k) in shapes.items() if tensor.endswith(ends[1])}
    return [k for tensor, (_, k) in shapes.items() if tensor.endswith(ends[0])], responses


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


def _parts_of(site: str) -> tuple[str, ...]:
    return PARTS + RESPONSE_PARTS if site == "attention" else PARTS


def _where(tensor: str, path: str | Path) -> Sum:
    words = tensor.split(".")
    if len(words) != 4 or words[0] != "layers" or not words[1].isdecimal() or words[3] not in _parts_of(words[2]):
        raise ValueError(f"predictor {path}: {tensor} is not the name of a predictor's tensor")
    return int(words[1]), words[2]
