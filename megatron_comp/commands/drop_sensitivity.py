# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp drop sensitivity`: what each block's dropped sum costs."""

import argparse

from ..launcher import output
from ..quality.metrics import perplexity
from ..spd.blocks import classify, layers_that_drop
from . import drop_options, setup
from .arguments.drop_sensitivity import MEASURES

COLUMNS = {
    "block": ("block", "d"),
    "perplexity": ("perplexity, it and all after dropped", ".3f"),
    "perplexity_delta": ("its part", "+.3f"),
    "kl": ("KL, it alone dropped", ".5f"),
    "rank": ("rank", "d"),
    "class": ("class", ""),
}


def check(args: argparse.Namespace) -> None:
    drop_options.check(args)
    if args.thresholds:
        first, second = args.thresholds
        if not first <= second:  # as it is not where one of them is nan
            raise ValueError(
                f"--thresholds {first} {second}: expected two numbers, of which the first is not the larger"
            )


def run(args: argparse.Namespace) -> None:
    check(args)
    with setup.judging(args) as judge:
        points, full = measure(judge)
    if not output.is_first_rank():
        return
    rows = rank(points, full, MEASURES[args.rank_by], args.thresholds or default_thresholds(args.rank_by, full))
    output.show(f"drop sensitivity: TP={args.tp}, the full model's perplexity {full:.3f}", COLUMNS, rows)
    output.write_json(args.json, vars(args), rows)
    if args.figure:
        from ..spd.plot import draw_sensitivity

        draw_sensitivity(rows, MEASURES[args.rank_by], args.figure)


def default_thresholds(rank_by: str, full: float) -> tuple[float, float]:
    unit = full if rank_by == "perplexity" else 1.0
    return 0.01 * unit, 0.05 * unit


def measure(judge) -> tuple[list[dict], float]:
    """For each block its `perplexity` with all after it dropped and `kl` alone; and the full model's perplexity."""
    from ..policy import CompressionPolicy
    from ..quality.judge import Trial

    def point(*blocks: int) -> dict:
        policy = CompressionPolicy(layers=layers_that_drop(blocks))
        return judge.point(Trial(f"blocks {blocks[0]} to {blocks[-1]} dropped" if blocks else "full", policy))

    count, points = judge.model.config.num_layers, []
    full = perplexity(point()["nll"])
    for block in reversed(range(count)):
        onwards = point(*range(block, count))
        points.append({"block": block, "perplexity": perplexity(onwards["nll"]), "kl": point(block)["kl"]})
    return points[::-1], full


def rank(points: list[dict], full: float, measure_name: str, thresholds: tuple[float, float]) -> list[dict]:
    """Rows in the model's order, `rank` 0 the least sensitive."""
    after = [point["perplexity"] for point in points[1:]] + [full]
    rows = [{**point, "perplexity_delta": point["perplexity"] - next_} for point, next_ in zip(points, after)]
    for row in rows:
        row["class"] = classify(row[measure_name], *thresholds)
        row["rank"] = sum(other[measure_name] < row[measure_name] for other in rows)
    return rows
