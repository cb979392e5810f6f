# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp drop sensitivity`: what each block's dropped sum costs."""

import argparse

from ..launcher import output, ranks
from ..quality.metrics import perplexity
from ..quality.origin import settings
from ..quality.windows import read_windows
from ..spd.blocks import classify, layers_that_drop
from . import drop_options, options

DESCRIPTION = """\
Measure what each block's dropped sum costs on a text, and rank the blocks. There are two measures: the paper's (arXiv
2502.20727, section 3), perplexity with blocks i to last dropped, less that with i + 1 to last dropped; and KL to the
full model with block i alone dropped, which the noise of a short text and the damage of other blocks do not reach. Two
thresholds split the blocks into insensitive ones (to be dropped as they are), sensitive ones (to be distilled) and
extreme ones (to be grouped, then distilled).
"""
EPILOG = """\
Example:
  megatron-comp drop sensitivity --model llama --tp 2 --text calibration.txt --json sensitivity.json

With --state, runs with other thresholds use the same measurements.
"""
MEASURES = {"kl": "kl", "perplexity": "perplexity_delta"}

COLUMNS = {
    "block": ("block", "d"),
    "perplexity": ("perplexity, it and all after dropped", ".3f"),
    "perplexity_delta": ("its part", "+.3f"),
    "kl": ("KL, it alone dropped", ".5f"),
    "rank": ("rank", "d"),
    "class": ("class", ""),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    drop_options.add_ranks(parser, tokens=2048)
    parser.add_argument(
        "--rank-by", choices=MEASURES, default="kl", help="The measure by which blocks are ranked (default kl)."
    )
    parser.add_argument(
        "--thresholds",
        type=float,
        nargs=2,
        metavar=("T1", "T2"),
        help="Of that measure: insensitive up to T1, extreme above T2 (default: 1 %% and 5 %% of the full model's "
        "perplexity, or 0.01 and 0.05 nats).",
    )
    options.add_state(parser)
    options.add_figure(parser, "both measures by block")


def check(args: argparse.Namespace) -> None:
    drop_options.check(args)
    if args.thresholds and not args.thresholds[0] <= args.thresholds[1]:
        raise ValueError(f"--thresholds {args.thresholds[0]} {args.thresholds[1]}: the first must not be the larger")


def run(args: argparse.Namespace) -> None:
    from ..quality.journal import Journal
    from ..quality.judge import Judge

    check(args)
    with options.opened(args) as (model, tokenizer), ranks.alone(args.state):
        journal = Journal(args.state, settings(args, next(model.parameters()).dtype))
        judge = Judge(model, read_windows(args, tokenizer), journal)
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
