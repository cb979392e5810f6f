"""Perplexity, KL and bytes of a model under policies on a text; every point is kept, and measured once."""

import json
import math
from collections.abc import Collection
from pathlib import Path

import torch
import torch.distributed as dist

from .. import files
from ..files import shown
from ..inference.weight_overrides import WeightOverrides
from ..layers.apply import apply_compression, remove_compression, stats
from ..policy import CompressionPolicy
from .comparison import Comparison
from .origin import digest


class Measured:
    """Points in a file: rank 0 reads and writes it, and what it holds is what all ranks know.

    settings: all that points depend on. Raises ValueError, on every rank, if the file is of other ones.
    """

    def __init__(self, path: str | None, settings: dict) -> None:
        self.path, self.settings, self.points = path, settings, {}
        found: list[dict | str] = [{}]
        if dist.get_rank() == 0 and path and Path(path).exists():
            found[0] = self._read()
        dist.broadcast_object_list(found, 0)
        if isinstance(found[0], str):
            raise ValueError(found[0])
        self.points = found[0]

    def _read(self) -> dict | str:
        try:
            content = files.read_json(self.path, "--state")
            settings, points = content["settings"], content["points"]
            for name, point in points.items():
                if not all(isinstance(value, (int, float)) for value in point.values()):
                    raise ValueError(f"point {shown(name)} does not consist of numbers")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            return f"--state {self.path} is not a state of this command: {error!r}"
        ours = json.loads(json.dumps(self.settings))
        if settings != ours:
            return f"--state {self.path} is of {shown(settings)}, not of {ours}: name another file, or remove it"
        return points

    def keep(self, name: str, point: dict) -> dict:
        """Rank 0's point, on all ranks. An interruption leaves the file as it was or as it will be."""
        everybodys = [point]
        dist.broadcast_object_list(everybodys, 0)
        self.points[name] = everybodys[0]
        if self.path and dist.get_rank() == 0:
            files.write_json(self.path, {"settings": self.settings, "points": self.points})
        return self.points[name]


class Judge:
    """A model and a text, and what was measured of them. windows: int64 `[windows, context]`."""

    def __init__(self, model: torch.nn.Module, model_dir: str, windows: torch.Tensor, measured: Measured) -> None:
        self.model, self.model_dir, self.measured = model, model_dir, measured
        self._comparison = Comparison(model, windows)

    def point(
        self, name: str, policy: CompressionPolicy, weights: str | None = None, layers: Collection[int] = ()
    ) -> dict:
        """`perplexity`, `kl` in nats a token and `top1_agreement` to the full model, `received_bytes` of this rank.

        weights: a file whose weights take the place of the model's own in `layers`.
        """
        key = key_of(policy, weights, layers)
        if key in self.measured.points:
            return self.measured.points[key]
        self._comparison.measure_full()
        overrides = WeightOverrides(self.model, self.model_dir, weights) if weights else None
        if overrides:
            overrides.use(layers)
        try:
            apply_compression(self.model, policy)
            quality = self._comparison.quality(name)
            received = stats(self.model).received_bytes
        finally:
            remove_compression(self.model)
            if overrides:
                overrides.use()
        nll = quality.nll / quality.tokens
        return self.measured.keep(
            key,
            {
                "perplexity": math.exp(min(nll, 700)),
                "kl": quality.kl / quality.tokens,
                "top1_agreement": quality.agreements / quality.tokens,
                "received_bytes": received,
            },
        )


def key_of(policy: CompressionPolicy, weights: str | None, layers: Collection[int]) -> str:
    """Under which a point is kept: with weights, also what is in their file."""
    return f"{policy} {digest(weights)} {sorted(layers)}" if weights else str(policy)
