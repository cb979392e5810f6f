# SPDX-License-Identifier: Apache-2.0
"""Parts of partial sums that every rank computes by itself from a block's input, so that they need not travel.

All ranks hold the same input X of a block. With u = X / rms(X), token by token, rank r's partial sum is

    Y_r = (u V) U_r + b_r + E_r             V [hidden, k], U_r [k, hidden], b_r [hidden]

Every rank knows V and the sums of all U_r and all b_r, so only the residuals E_r are encoded and sent:

    sum_r Y_r = (u V) (sum_r U_r) + sum_r b_r + sum_r E_r

`megatron-comp predictor fit` finds V, U_r and b_r by least squares. They are weights in a file beside the checkpoint.

Sums stay equal to the bit on all ranks if these products do: the same matrices, shapes and kernels on the same kind of
device. `Predictors.digest` holds the bytes that a rank's own device makes of a fixed input, for ranks to compare.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.functional import pad

EPSILON = 1e-5
TENSOR_PARALLEL = "tensor_parallel"  # key of a file's metadata: the number of ranks that it is for
PARTS = ("down", "up", "bias")
PROBED_ROWS = (1, 7, 256)  # kernels of products differ by the number of rows


class Known(NamedTuple):
    """What is known of a sum before it is exchanged: of this rank's part `small @ own`, of the whole `small @ total`.

    Both are added by the product that makes them, and are never tensors of their own. small `[rows, K]`, own and total
    `[K, hidden]`: K is k and the columns of ones that `with_bias` makes room for.
    """

    small: torch.Tensor
    own: torch.Tensor
    total: torch.Tensor

    def less_own(self, partial: torch.Tensor) -> torch.Tensor:
        """A partial sum `[..., hidden]` without this rank's part: overwritten where no gradient passes."""
        return _added(partial, self.small, self.own, -1)

    def plus_total(self, rest: torch.Tensor) -> torch.Tensor:
        """What was sent `[..., hidden]`, and all ranks' parts: overwritten where no gradient passes."""
        return _added(rest, self.small, self.total, 1)

    def split(self, rows: list[int]) -> list["Known"]:
        """Of so many rows each."""
        return [self._replace(small=each) for each in self.small.split(rows)]


def _added(x: torch.Tensor, small: torch.Tensor, up: torch.Tensor, sign: int) -> torch.Tensor:
    flat, small, up = x.reshape(len(small), -1), small.to(x.dtype), up.to(x.dtype)
    # In place: on a CPU three quarters of the time of a product and a sum, fp32, 1024 tokens of 576 values, k = 64.
    add = torch.addmm if x.requires_grad else torch.Tensor.addmm_
    return add(flat, small, up, alpha=sign).view_as(x)


@dataclass(frozen=True)
class SitePredictor:
    """Of one sum: down `[hidden, k]`, up with bias `[K, hidden]` of this rank, and those of all ranks added up."""

    down: torch.Tensor
    own: torch.Tensor
    total: torch.Tensor

    def __call__(self, x: torch.Tensor) -> Known:
        """Of a block's input `[..., hidden]`: for attention what its layer is given, for the MLP or the experts what
        follows attention, both before their norms.

        No gradient passes: what ranks take off and what they add are equal.
        """
        small = normalized(x.detach()).reshape(-1, x.shape[-1]) @ self.down
        return Known(pad(small, (0, len(self.own) - small.shape[1]), value=1.0), self.own, self.total)


def with_bias(up: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """up `[ranks, k, hidden]`, below it the bias `[ranks, hidden]`, and zeros to the next multiple of eight rows.

    A product's inner dimension is a multiple of eight, since tensor cores want rows of whole 16 bytes.
    """
    return torch.cat([up, pad(bias[:, None], (0, 0, 0, 7 - up.shape[1] % 8))], dim=1)


def normalized(x: torch.Tensor) -> torch.Tensor:
    """Each token `[..., hidden]` over its root mean square, in the type of `x`."""
    # One pass without a copy: half of the time that the mean of x.square() takes.
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (x * torch.rsqrt(size.square() / x.shape[-1] + EPSILON)).to(x.dtype)


class Predictors:
    """All predictors of a file, for one rank of a tensor-parallel group.

    digest: equal on ranks whose files, and whose products of a fixed input, are equal to the bit.

    Raises OSError or ValueError for a file that is damaged, or not of this number of ranks or values per token.
    """

    def __init__(self, path: Path, rank: int, ranks: int, like: torch.Tensor, hidden: int) -> None:
        """like: of the type and device that the predictors get."""
        self.path = path
        with _opened(path, ranks) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        self.sites = {
            where: self._of_rank([tensors.get(f"{name(*where)}.{part}") for part in PARTS], where, rank, ranks, hidden)
            for where in sorted({_where(each, path) for each in tensors})
        }
        self.sites = {where: _moved(each, like) for where, each in self.sites.items()}
        self.digest = self._digest(tensors, hidden, like)

    @property
    def layers(self) -> set[int]:
        return {layer for layer, _ in self.sites}

    def _of_rank(self, parts: list, where: tuple[int, str], rank: int, ranks: int, hidden: int) -> SitePredictor:
        k = parts[0].shape[1] if parts[0] is not None and parts[0].dim() == 2 else 0
        for part, tensor, shape in zip(PARTS, parts, ((hidden, k), (ranks, k, hidden), (ranks, hidden)), strict=True):
            if tensor is None or tuple(tensor.shape) != shape:
                found = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
                raise ValueError(f"predictor {self.path}: {name(*where)}.{part} {found}, expected {list(shape)}")
        down, up, bias = (each.float() for each in parts)
        ups = with_bias(up, bias)
        return SitePredictor(down, ups[rank], ups.sum(0))

    def _digest(self, tensors: dict[str, torch.Tensor], hidden: int, like: torch.Tensor) -> str:
        made = hashlib.sha256()
        for key in sorted(tensors):
            made.update(key.encode() + _bytes(tensors[key]))
        for rows in PROBED_ROWS:
            x = torch.linspace(-1, 1, rows * hidden, dtype=torch.float32).view(rows, hidden).to(like)
            for site in self.sites.values():
                made.update(_bytes(site(x).plus_total(torch.zeros_like(x))))
        return made.hexdigest()[:16]


def read_predictors(path: str | Path, rank: int, ranks: int, like: torch.Tensor, hidden: int) -> Predictors:
    """`Predictors` of these arguments. The last ones stay in memory: a search applies policies window by window."""
    file = Path(path)
    return _read(file, file.stat().st_mtime_ns, rank, ranks, like.dtype, like.device, hidden)


@lru_cache(maxsize=1)
def _read(path: Path, _written: int, rank: int, ranks: int, dtype, device, hidden: int) -> Predictors:
    return Predictors(path, rank, ranks, torch.empty(0, dtype=dtype, device=device), hidden)


def inner_sizes(path: str | Path, ranks: int, hidden: int) -> list[int]:
    """K of each sum's predictor, without reading weights. Raises OSError or ValueError as `Predictors` does."""
    with _opened(path, ranks) as file:
        shapes = {each: file.get_slice(each).get_shape() for each in file.keys() if each.endswith(".down")}  # noqa: SIM118
    for tensor, shape in shapes.items():
        if len(shape) != 2 or shape[0] != hidden:
            raise ValueError(f"predictor {path}: {tensor} has shape {shape}; the model has {hidden} values per token")
    return [k for _, k in shapes.values()]


@contextmanager
def _opened(path: str | Path, ranks: int) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            made_for = (file.metadata() or {}).get(TENSOR_PARALLEL)
            if made_for != str(ranks):
                raise ValueError(f"predictor {path} is for {made_for or 'an unknown number of'} ranks, not for {ranks}")
            yield file
    except SafetensorError as error:
        raise ValueError(f"predictor {path} is not a valid safetensors file: {error}") from None


def name(layer: int, site: str) -> str:
    """Of a site's tensors in the file, before `.down`, `.up` and `.bias`."""
    return f"layers.{layer}.{site}"


def _where(tensor: str, path: str | Path) -> tuple[int, str]:
    words = tensor.split(".")
    if len(words) != 4 or words[0] != "layers" or not words[1].isdecimal() or words[3] not in PARTS:
        raise ValueError(f"predictor {path}: {tensor} is not the name of a predictor's tensor")
    return int(words[1]), words[2]


def _moved(site: SitePredictor, like: torch.Tensor) -> SitePredictor:
    return SitePredictor(*(each.to(like).contiguous() for each in vars(site).values()))


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
