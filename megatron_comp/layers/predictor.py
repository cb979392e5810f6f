# SPDX-License-Identifier: Apache-2.0
"""Parts of partial sums that every rank computes by itself from a block's input, so that they need not travel.

All ranks hold the same input X of a block. With u = X / rms(X), token by token, rank r's partial sum is

    Y_r = (u V - m) U_r + b_r + E_r             V [hidden, k], m [k], U_r [k, hidden], b_r [hidden]

Every rank knows V, m and the sums of all U_r and all b_r, so only the residuals E_r are encoded and sent:

    sum_r Y_r = (u V - m) (sum_r U_r) + sum_r b_r + sum_r E_r

Where attention's sum is dropped, rank r's MLP sees all predictions, but no residual other than its own:

    h_r = X + sum_s (Y_s - E_s) + E_r

A part of what the other ranks' MLPs would make of E_r is linear in it. Rank r adds this response to what it sends:

    out = X + c + sum_r (Y_r + E_r D F + MLP_r(norm(h_r)))      D [hidden, k], F [k, hidden], c [hidden] a mean

`megatron-comp predictor fit` finds all of them by least squares; m and b_r are means, of u V and of Y_r. They are
weights in a file beside the checkpoint.

Sums stay equal to the bit on all ranks if these products do: the same matrices, shapes and kernels on the same kind of
device. `Predictors.digest` holds the bytes that a rank's own device makes of a fixed input, for ranks to compare.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from .predictor_file import Regression, Response, Sum, normalized, read_regressions

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
    """Of one sum: down `[hidden, K]` and an offset `[K]`; of this rank and of all, up and bias `[K, hidden]`.

    response: of the other ranks' MLPs to what they do not see of a dropped sum, where the file has one.
    """

    down: torch.Tensor
    offset: torch.Tensor
    own: torch.Tensor
    total: torch.Tensor
    response: Response | None

    @classmethod
    def of(cls, regression: Regression, rank: int, like: torch.Tensor) -> "SitePredictor":
        """like: of the type and device that it gets."""
        down, mean, up, bias, response = regression.to(torch.float32)
        ups = with_bias(up, bias)
        more = ups.shape[1] - len(mean)
        offset = torch.cat([-mean, torch.eye(1, more)[0]])  # a one for the bias
        down, offset, own, total = (
            each.to(like).contiguous() for each in (pad(down, (0, more)), offset, ups[rank], ups.sum(0))
        )
        return cls(down, offset, own, total, response and response.to(like))

    def __call__(self, x: torch.Tensor) -> Known:
        """Of a block's input `[..., hidden]`: for attention what its layer is given, for the MLP or the experts what
        follows attention, both before their norms.

        No gradient passes: what ranks take off and what they add are equal.
        """
        small = torch.addmm(self.offset, normalized(x.detach()).reshape(-1, x.shape[-1]), self.down)
        return Known(small, self.own, self.total)


def with_bias(up: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """up `[ranks, k, hidden]`, below it the bias `[ranks, hidden]`, and zeros to the next multiple of eight rows.

    A product's inner dimension is a multiple of eight, since tensor cores want rows of whole 16 bytes.
    """
    return torch.cat([up, pad(bias[:, None], (0, 0, 0, 7 - up.shape[1] % 8))], dim=1)


class Predictors:
    """All predictors of a file, for one rank of a tensor-parallel group.

    digest: equal on ranks whose files, and whose products of a fixed input, are equal to the bit.

    Raises OSError or ValueError for a file that is damaged, or not of this number of ranks or values per token.
    """

    def __init__(self, path: Path, rank: int, ranks: int, like: torch.Tensor, hidden: int) -> None:
        """like: of the type and device that the predictors get."""
        self.path = path
        regressions = read_regressions(path, ranks, hidden)
        self.sites = {where: SitePredictor.of(each, rank, like) for where, each in regressions.items()}
        self.digest = self._digest(regressions, hidden, like)

    @property
    def layers(self) -> set[int]:
        return {layer for layer, _ in self.sites}

    def _digest(self, regressions: dict[Sum, Regression], hidden: int, like: torch.Tensor) -> str:
        made = hashlib.sha256()
        for where, each in regressions.items():
            for key, tensor in each.named(where).items():
                made.update(key.encode() + _bytes(tensor))
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


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
