# SPDX-License-Identifier: Apache-2.0
"""The uniform search of arXiv 2411.09510, one codec for every sum, and the baselines of its tables.

    python -m research.paper_search --model DIR --tp N --text FILE --out policy.yaml

The paper tries value types, block sizes and scales, keeps what raises perplexity by less than 3 % on a part of
WikiText, and takes the one of highest compression. It sums by all-gather and leaves a rank's own share exact; here that
share is rounded too, since ranks would drift apart otherwise.

Two baselines are no codecs of ours. They are simulated: each rank's partial sum is rounded as they would round it, then
summed by the stock collective. The paper gives no formula; these are what the names commonly say (arXiv 2301.02654):

    int4 channel-wise    a symmetric scale, fp16, for each channel (entry of the hidden dimension) over all tokens of a
                         message; integers of -7 to 7
    topk 3x              of each token the entries of largest magnitude, as 16-bit values with 16-bit places, as many as
                         make a third of the 16-bit tensor: one in six; all others are zero
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_comp.cli import carry_out
from megatron_comp.commands import search
from megatron_comp.commands.arguments.search import add_search
from megatron_comp.commands.search_report import report
from megatron_comp.launcher import output
from megatron_comp.layers.apply import remove_compression
from megatron_comp.layers.places import Place, find_places
from megatron_comp.layers.reducer import Reducer
from megatron_comp.policy import CompressionPolicy
from megatron_comp.quality.judge import Trial
from megatron_comp.search.bound import Bound
from megatron_comp.search.candidates import uniform
from megatron_comp.search.found import Found
from megatron_comp.search.measurements import Measurements, labels

VALUES = ("fp3_e1m1", "fp4_e2m1", "int4", "fp5_e2m2", "fp5_e3m1")
BLOCKS = (8, 16, 32)
SCALES = ("e5m0", "e8m0")  # the paper's published bits fit the first, its timings name the second
TOPK_RATIO = 3


class RoundedSum(Reducer):
    """The stock sum of partial sums that `rounding` has rounded."""

    def __init__(
        self, policy: CompressionPolicy, place: Place, rounding: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__(policy, place.layer, place.site, place.group)
        self.rounding = rounding

    def __call__(self, partial_sum: torch.Tensor, *_args, **_kwargs) -> torch.Tensor:
        total = self.rounding(partial_sum.float()).to(partial_sum.dtype).contiguous()
        dist.all_reduce(total, group=self.group)
        return total

    def part_rows(self, shape: Sequence[int], like: torch.Tensor) -> list[int]:
        return [torch.Size(shape[:-1]).numel()]  # scales are those of a whole message


def int4_by_channel(x: torch.Tensor) -> torch.Tensor:
    """`[..., hidden]`, each channel rounded to 15 levels up to its largest magnitude."""
    rows = x.reshape(-1, x.shape[-1])
    scale = (rows.abs().amax(0) / 7).half().float()
    scale = torch.where(scale > 0, scale, 1.0)
    return ((rows / scale).round().clamp(-7, 7) * scale).view(x.shape)


def topk(x: torch.Tensor) -> torch.Tensor:
    """`[..., hidden]`, all but the largest magnitudes of each token zero."""
    kept = max(1, round(x.shape[-1] * 16 / TOPK_RATIO / 32))
    places = x.abs().topk(kept, dim=-1).indices
    return torch.zeros_like(x).scatter(-1, places, x.gather(-1, places))


@dataclass(frozen=True)
class Rounded(Trial):
    """Stock sums of partial sums that `rounding` has rounded: `[..., hidden]` to the same shape."""

    rounding: Callable[[torch.Tensor], torch.Tensor] = torch.clone

    @property
    def key(self) -> str:
        return self.name

    def apply(self, model: torch.nn.Module) -> None:
        remove_compression(model)
        # With a policy that compresses, every place lets itself be attached to.
        policy = CompressionPolicy(codec="mxfp4", min_bytes=0)
        for place in find_places(model):
            place.attach(RoundedSum(policy, place, self.rounding))


def search_uniform(measurements: Measurements, bound: Bound, min_bytes: int | str) -> Found:
    """The codec of fewest bits within the bound, for all places. Raises ValueError if no codec keeps it."""
    points = {}
    for codec in (f"{value}:{block}:{scale}" for value in VALUES for block in BLOCKS for scale in SCALES):
        points[codec] = measurements.point(codec, "format", uniform(codec, "gather_sum"))
    judge = measurements.judge
    for trial, bits in (
        (Rounded("int4 channel-wise", rounding=int4_by_channel), 4 + 16 / judge.windows.shape[1]),
        (Rounded("topk 3x", rounding=topk), 16 / TOPK_RATIO),
    ):
        judge.point(trial, **(labels(trial, "baseline") | {"algorithm": "all_reduce", "bits_per_value": bits}))
    able = [codec for codec, point in points.items() if bound.of(point) <= bound.limit]
    if not able:
        best = min(points, key=lambda codec: bound.of(points[codec]))
        raise ValueError(
            f"{bound} is kept by none of the paper's formats: {best} comes nearest with {bound.of(points[best]):.4g}"
        )
    chosen = min(able, key=lambda codec: (points[codec]["bits_per_value"], bound.of(points[codec])))
    return Found(uniform(chosen, "gather_sum", min_bytes), points[chosen], bound)


check = search.check_search


def run(args: argparse.Namespace) -> None:
    check(args)
    with search.measuring(args, search="paper", candidates=[]) as measurements:
        found = search_uniform(measurements, search.bound_of(args), args.min_bytes)
    if output.is_first_rank():
        report(args, found, measurements.judge, "python -m research.paper_search")


def main(argv: list[str] | None = None) -> int:
    """0, or non-zero after one clear line on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m research.paper_search",
        description="Try one codec for all sums, value x block x scale, as arXiv 2411.09510 did, beside its baselines. "
        "The bound is a perplexity increase of 3 % unless another one is given.",
    )
    add_search(parser)
    argv = sys.argv[1:] if argv is None else argv
    return carry_out(lambda: sys.modules[__name__], parser.parse_args(argv), "research.paper_search", argv)


if __name__ == "__main__":
    sys.exit(main())
