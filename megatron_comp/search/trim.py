# SPDX-License-Identifier: Apache-2.0
"""Which sums get how much of a predictor: the ranks that leave the least damage for an amount of work.

A sum's damage is taken as `weight * left(rank)` of its fit: rounding errors grow with what is left of the sum, and hurt
in proportion to the residual stream that they are added to.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ..layers.predictor_file import MADE_BY, TENSOR_PARALLEL, Sum, read_metadata, read_regressions
from ..spd.weights import replace_file
from .solve import Choice, Frontier

# What predicting a sum takes at any rank, a norm and two passes over the sum, is as much as so many columns. Measured:
# 31 in fp32, 27 in bf16, on one thread of a Xeon, for 1,024 tokens of 576 values.
FIXED = 32

# Keys of what a fitted file was made by: how many layers it has when it is whole, and `Fitted.column`.
LAYERS, COLUMN = "layers", "column"


@dataclass(frozen=True)
class Fitted:
    """What there is to choose from. traces: the `SiteFit.trace` of each of the model's sums, None where none helps.

    column: share of the layers' multiplications that a column of a predictor adds to a rank.
    """

    traces: dict[Sum, dict | None]
    column: float

    @classmethod
    def read(cls, path: str | Path) -> "Fitted":
        """Raises ValueError for a file that `megatron-comp predictor fit` has not finished, or has not made."""
        metadata = read_metadata(path)
        made_by, rows = (json.loads(metadata.get(key, "{}")) for key in (MADE_BY, "rows"))
        if LAYERS not in made_by:
            raise ValueError(f"predictor {path} is not a file that `megatron-comp predictor fit` has written")
        if len(rows) < (layers := made_by[LAYERS]):
            raise ValueError(f"predictor {path} has {len(rows)} of {layers} layers: repeat `predictor fit`")
        traces = {
            (int(layer), site): known if site in row["written"].split(", ") else None
            for layer, row in rows.items()
            for site, known in row["traces"].items()
        }
        return cls(traces, made_by[COLUMN])

    def choose(self, work: float) -> dict[Sum, int]:
        """The rank of each sum's predictor, 0 for none. work: allowed, as a share of the layers' multiplications.

        A sum that is predicted at all takes FIXED columns more than its rank.
        """
        items = {key: _choices(known) if known else [Choice(0, 0, 0.0)] for key, known in self.traces.items()}
        picked = Frontier(items).within(int(work / self.column))
        return {key: choice.name for key, choice in picked.items()}


def left_of(known: dict | None, rank: int) -> float:
    """Share of a sum's energy that a predictor of this rank, one of the trace's, leaves."""
    return known["left"][known["ranks"].index(rank)] if known and rank else 1.0


def _choices(known: dict) -> list[Choice]:
    kept = [
        Choice(rank, rank + FIXED, known["weight"] * left)
        for rank, left in zip(known["ranks"], known["left"], strict=True)
        if rank
    ]
    return [Choice(0, 0, known["weight"]), *kept]


def trim(path: str | Path, ranks: dict[Sum, int], out: str | Path, work: float) -> None:
    """Writes the predictors of `path`, each cut to its rank. work: that `Fitted.choose` chose them for."""
    metadata = read_metadata(path)
    tensors: dict[str, torch.Tensor] = {}
    for where, regression in read_regressions(path, int(metadata[TENSOR_PARALLEL])).items():
        if k := ranks[where]:
            tensors |= regression.cut(k).named(where)
    made_by = json.loads(metadata[MADE_BY]) | {"work": work}
    del made_by[LAYERS], made_by[COLUMN]  # it is not trimmed again
    kept = {key: metadata[key] for key in (TENSOR_PARALLEL, "format")}
    replace_file(out, tensors, kept | {MADE_BY: json.dumps(made_by)})
