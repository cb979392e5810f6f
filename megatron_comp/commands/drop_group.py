# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp drop group`: heads assigned to ranks anew."""

import argparse

from ..launcher import output
from ..spd.blocks import parse_blocks
from . import drop_options

COLUMNS = {
    "block": ("block", "d"),
    "criterion": ("criterion", ""),
    "order": ("key-value heads", ""),
    "relative": ("error", ".4f"),
    "mse": ("mse", ".4g"),
    "written": ("written", ""),
}


def check(args: argparse.Namespace) -> list[int]:
    drop_options.check(args, "out")
    return parse_blocks(args.blocks)


def run(args: argparse.Namespace) -> None:
    from ..spd.block import check_can_drop
    from ..spd.heads import candidates, permuted_attention

    blocks = check(args)
    with drop_options.missing_blocks(args, blocks, {"criterion": args.criterion}) as (config, file, missing):
        check_can_drop(config)
        for block, x, target, rope in missing:
            tried = candidates(block, x, target, rope, args.ranks)
            best = min(tried, key=lambda name: tried[name]["relative"])
            chosen = best if args.criterion == "best" else args.criterion
            weights = permuted_attention(block, tried[chosen]["order"])
            file.add(block.number, block.named(weights), {"criterion": chosen, "tried": tried})
    rows = [
        {
            "block": block,
            "criterion": name,
            **found,
            "order": " ".join(map(str, found["order"])),
            "written": "*" if name == file.rows[str(block)]["criterion"] else "",
        }
        for block in blocks
        for name, found in file.rows[str(block)]["tried"].items()
    ]
    output.show(f"drop group: TP={args.ranks}", COLUMNS, rows)
    output.write_json(args.json, vars(args), rows)
