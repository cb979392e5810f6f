# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp predictor trim`: less work, where it is missed least."""

import argparse
from pathlib import Path

from ..launcher import output
from . import checks

HEADINGS = {"mlp": "MLP"}


def check(args: argparse.Namespace) -> None:
    if not Path(args.predictor).is_file():
        raise ValueError(f"{args.predictor}: no such file")
    checks.at_least_one(args, "mean_rank")
    checks.check_written(args, "out")
    if Path(args.out).exists() and Path(args.out).samefile(args.predictor):
        raise ValueError(f"--out {args.out}: is the file to trim; name another")


def run(args: argparse.Namespace) -> None:
    from ..search.trim import choose, left_of, read_traces, trim

    check(args)
    traces = read_traces(args.predictor)
    ranks = choose(traces, args.mean_rank)
    trim(args.predictor, ranks, args.out, args.mean_rank)
    rows: dict[int, dict] = {}
    for (layer, site), rank in sorted(ranks.items()):
        row = rows.setdefault(layer, {"block": layer})
        row |= {f"{site}_rank": rank, f"{site}_left": left_of(traces[layer, site], rank)}
    columns = {"block": ("layer", "d")}
    for site in sorted({site for _, site in ranks}):
        columns |= {f"{site}_rank": (f"{HEADINGS.get(site, site)}: rank", "d"), f"{site}_left": ("left", ".3f")}
    predicted = sum(rank > 0 for rank in ranks.values())
    title = f"predictor trim: {predicted} of {len(ranks)} sums, as much work as rank {args.mean_rank} for each"
    output.show(title, columns, list(rows.values()))
    output.write_json(args.json, vars(args), list(rows.values()))
