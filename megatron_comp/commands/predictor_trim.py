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
    if not 0 < args.work <= 100:
        raise ValueError(f"--work {args.work:g}: allowed are percents above 0, up to 100")
    checks.check_written(args, "out")
    if Path(args.out).exists() and Path(args.out).samefile(args.predictor):
        raise ValueError(f"--out {args.out}: is the file to trim; name another")


def run(args: argparse.Namespace) -> None:
    from ..search.trim import Fitted, left_of, trim

    check(args)
    fitted = Fitted.read(args.predictor)
    ranks = fitted.choose(args.work / 100)
    if not (predicted := sum(rank > 0 for rank in ranks.values())):
        raise ValueError(f"--work {args.work:g}: not enough for a single sum's predictor")
    trim(args.predictor, ranks, args.out, args.work / 100)
    rows: dict[int, dict] = {}
    for (layer, site), rank in sorted(ranks.items()):
        row = rows.setdefault(layer, {"block": layer})
        row |= {f"{site}_rank": rank, f"{site}_left": left_of(fitted.traces[layer, site], rank)}
    columns = {"block": ("layer", "d")}
    for site in sorted({site for _, site in ranks}):
        columns |= {f"{site}_rank": (f"{HEADINGS.get(site, site)}: rank", "d"), f"{site}_left": ("left", ".3f")}
    columns_of_all = sum(ranks.values())
    title = (
        f"predictor trim: {predicted} of {len(ranks)} sums, {columns_of_all} columns, "
        f"{columns_of_all * fitted.column:.1%} of the layers' multiplications"
    )
    output.show(title, columns, list(rows.values()))
    output.write_json(args.json, vars(args), list(rows.values()))
