"""`megatron-comp drop curve`: quality and bytes against the share of dropped sums, on a text that nothing was tuned on.

Blocks are dropped in the model's order and, with --sensitivity, from the least sensitive on; with --distilled also with
those weights in the dropped blocks; each with every --codec in the sums that are left. The full model with its own
weights and no codec is what all are compared to.
"""

import argparse

from ..launcher import output, ranks
from ..quality.origin import origin
from ..quality.windows import read_windows
from ..spd.blocks import layers_that_drop, read_rows, share_of
from . import drop_options, options

EPILOG = "With --state an interrupted run goes on where it was."

COLUMNS = {
    "order": ("order", ""),
    "codec": ("codec", ""),
    "percent": ("% dropped", ".0f"),
    "dropped": ("blocks", "d"),
    "replaced": ("distilled", "d"),
    "perplexity": ("perplexity", ".3f"),
    "perplexity_increase_pct": ("+%", ".2f"),
    "kl": ("KL, nats", ".4f"),
    "top1_agreement": ("top-1", ".4f"),
    "received_bytes": ("bytes/rank", ",d"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    drop_options.add_ranks(parser, tokens=6144)
    parser.add_argument("--sensitivity", metavar="FILE", help="JSON of `megatron-comp drop sensitivity`")
    parser.add_argument("--distilled", metavar="FILE", help="weights of `megatron-comp drop distill` or `drop group`")
    parser.add_argument(
        "--percent",
        type=float,
        nargs="+",
        default=[0, 25, 50, 75, 100],
        metavar="P",
        help="shares of the blocks (default 0 25 50 75 100)",
    )
    parser.add_argument(
        "--codec", action="append", default=[], metavar="C", help="of the sums that are left (default none; repeatable)"
    )
    parser.add_argument("--in-order", action="store_true", help="with --sensitivity: in the model's order too")
    parser.add_argument("--state", metavar="FILE", help="keep every measurement there, and go on from it")
    parser.add_argument("--csv", metavar="FILE", help="write the rows there")
    parser.add_argument("--figure", metavar="FILE", help="draw the increase of perplexity by share")


def check(args: argparse.Namespace) -> list[str]:
    drop_options.check(args, "csv", "figure")
    output.check_resumed("--state", args.state)
    if outside := [percent for percent in args.percent if not 0 <= percent <= 100]:
        raise ValueError(f"--percent {outside[0]}: allowed are 0 to 100")
    codecs = args.codec or ["none"]
    for codec in codecs:
        policy([], codec)
    return codecs


def policy(blocks: list[int], codec: str):
    from ..policy import CompressionPolicy

    return CompressionPolicy(codec=codec, min_bytes=0, layers=layers_that_drop(blocks))


def run(args: argparse.Namespace) -> None:
    from ..quality.judge import Judge, Measured

    codecs = check(args)
    with options.opened(args) as (model, tokenizer), ranks.alone(args.state):
        settings = {**origin(args), "tp": args.tp, "dtype": str(next(model.parameters()).dtype)}
        judge = Judge(model, args.model, read_windows(args, tokenizer), Measured(args.state, settings))
        rows = measure(args, judge, codecs)
    if output.is_first_rank():
        output.show(f"drop curve: TP={args.tp}, {args.tokens} tokens, windows of {args.context}", COLUMNS, rows)
        output.write_json(args.json, vars(args), rows)
        output.write_csv(args.csv, rows)
        if args.figure:
            from ..spd.plot import draw_curve

            draw_curve(rows, args.figure)


def measure(args: argparse.Namespace, judge, codecs: list[str]) -> list[dict]:
    """A row for each order, codec and share."""
    from ..inference.weight_overrides import blocks_in

    in_order = list(range(judge.model.config.num_layers))
    orders: list[tuple[str, list[int], bool]] = []
    if args.sensitivity:
        by_rank = [row["block"] for row in read_rows(args.sensitivity)]
        if sorted(by_rank) != in_order:
            raise ValueError(f"--sensitivity {args.sensitivity} is of a model of {len(by_rank)} layers")
        orders.append(("sensitivity", by_rank, False))
    if args.in_order or not args.sensitivity:
        orders.insert(0, ("in order", in_order, False))
    if args.distilled:
        orders += [(f"{name}, distilled", order, True) for name, order, _ in orders[-1:]]
    full = judge.point("full", policy([], "none"))["perplexity"]
    rows = []
    for name, order, distilled in orders:
        for codec in codecs:
            for percent in args.percent:
                dropped = share_of(order, percent)
                replaced = sorted(blocks_in(args.distilled) & set(dropped)) if distilled else []
                weights = args.distilled if replaced else None
                point = judge.point(f"{name} {percent:g} % {codec}", policy(dropped, codec), weights, replaced)
                rows.append(
                    {
                        "order": name,
                        "codec": codec,
                        "percent": percent,
                        "dropped": len(dropped),
                        "replaced": len(replaced),
                        **point,
                        "perplexity_increase_pct": 100 * (point["perplexity"] / full - 1),
                    }
                )
    return rows
