# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp drop curve`: quality and bytes against the share of dropped sums."""

import argparse
from pathlib import Path

from ..inference import config
from ..launcher import output
from ..quality.metrics import increase_pct, perplexity
from ..spd.blocks import layers_that_drop, read_order, share_of
from . import drop_options, setup

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


def check(args: argparse.Namespace) -> list[str]:
    drop_options.check(args)
    if outside := [percent for percent in args.percent if not 0 <= percent <= 100]:
        raise ValueError(f"--percent {outside[0]}: allowed are 0 to 100")
    if args.sensitivity:
        read_order(args.sensitivity, config.read_raw(Path(args.model)).get("num_hidden_layers"))
    codecs = args.codec or ["none"]
    for codec in codecs:
        policy([], codec)
    return codecs


def policy(blocks: list[int], codec: str, predictor: str | None = None):
    from ..policy import CompressionPolicy

    return CompressionPolicy(codec=codec, min_bytes=0, layers=layers_that_drop(blocks), predictor=predictor)


def run(args: argparse.Namespace) -> None:
    codecs = check(args)
    with setup.judging(args, args.weights) as judge:
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
    from ..quality.judge import Trial

    in_order = list(range(judge.model.config.num_layers))
    orders: list[tuple[str, list[int], bool]] = []
    if args.sensitivity:
        orders.append(("sensitivity", read_order(args.sensitivity, len(in_order)), False))
    if args.in_order or not args.sensitivity:
        orders.insert(0, ("in order", in_order, False))
    if args.weights:
        orders += [(f"{name}, distilled", order, True) for name, order, _ in orders[-1:]]
    full = judge.point(Trial("full", policy([], "none")))["nll"]
    rows = []
    for name, order, distilled in orders:
        for codec in codecs:
            for percent in args.percent:
                dropped = share_of(order, percent)
                replaced = sorted(judge.overrides.blocks & set(dropped)) if distilled else []
                trial = Trial(f"{name} {percent:g} % {codec}", policy(dropped, codec, args.predictor), tuple(replaced))
                point = judge.point(trial)
                rows.append(
                    {
                        "order": name,
                        "codec": codec,
                        "percent": percent,
                        "dropped": len(dropped),
                        "replaced": len(replaced),
                        "perplexity": perplexity(point["nll"]),
                        "kl": point["kl"],
                        "top1_agreement": point["top1_agreement"],
                        "received_bytes": point["received_bytes"],
                        "perplexity_increase_pct": increase_pct(point["nll"], full),
                    }
                )
    return rows
