# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp drop distill`: weights for blocks without attention's sum."""

import argparse

import torch

from .. import files
from ..launcher import output
from ..quality.origin import digest
from ..spd.blocks import parse_blocks, write_policy
from ..spd.criteria import LOSSES
from . import drop_options

DESCRIPTION = """\
Train weights with which blocks without attention's sum give what the stock blocks give. This runs in one process: the
model's layers pass through memory one by one, with the activations of the whole text. Every finished block is written;
after an interruption the same command goes on behind the last one.
"""
EPILOG = """\
Example:
  megatron-comp drop distill --model llama --tp 2 --text calibration.txt --blocks 0,3-5 --out distilled.safetensors

The weights go with a policy that drops the same blocks' sums, and only with it: in a stock block they are wrong.
"""

COLUMNS = {
    "block": ("block", "d"),
    "relative_before": ("error before", ".4f"),
    "relative_after": ("after", ".4f"),
    "mse_before": ("mse before", ".4g"),
    "mse_after": ("after", ".4g"),
    "seconds": ("s", ".1f"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    drop_options.add_blocks(parser, tokens=65536)
    add = parser.add_argument
    add("--policy-out", metavar="FILE", help="Also write a policy that drops the sums of those blocks.")
    add("--start", metavar="FILE", help="Weights to start from, as `megatron-comp drop group` writes them.")
    add("--epochs", type=int, default=10, metavar="E", help="Number of passes over the text (default 10).")
    add("--batch", type=int, default=4, metavar="B", help="Number of windows per step (default 4).")
    add(
        "--learning-rate",
        type=float,
        default=1e-3,
        metavar="R",
        help="Of AdamW; it falls to 0 as a cosine (default 1e-3, for a model of 135M; the paper: 5e-5 for Llama-2).",
    )
    add(
        "--loss",
        choices=LOSSES,
        default="relative",
        help="Of the difference from the full block's output: relative to each token's mean square (default), or mse, "
        "the paper's.",
    )
    add("--seed", type=int, default=1, metavar="S", help="Seed of the order of windows (default 1).")
    add("--log", metavar="FILE", help="Write the loss there as CSV, a line per epoch.")


def check(args: argparse.Namespace) -> list[int]:
    drop_options.check(args, "out", "policy_out", "log")
    for option in ("epochs", "batch"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option} {getattr(args, option)}: at least 1 is needed")
    if not 0 < args.learning_rate < 1:
        raise ValueError(f"--learning-rate {args.learning_rate}: allowed are numbers above 0 and below 1")
    return parse_blocks(args.blocks)


def run(args: argparse.Namespace) -> None:
    blocks = check(args)
    with files.locked(args.out):
        _run(args, blocks)


def _run(args: argparse.Namespace, blocks: list[int]) -> None:
    from ..inference import hf
    from ..spd.block import Block, stream
    from ..spd.training import Recipe, distill
    from ..spd.weights import begin

    recipe = Recipe(args.ranks, args.epochs, args.batch, args.learning_rate, args.loss, args.seed)
    start = {"start": digest(args.start)} if args.start else {}
    config, file, missing = begin(args, blocks, {"recipe": str(recipe), **start})
    if args.start:
        hf.check_extra(args.start, args.ranks)
    with hf.Checkpoint(args.model) as own, hf.Checkpoint(args.model, args.start) as started:
        for teacher, x, target, rope in stream(own, config, drop_options.windows(args), missing):
            student = Block(config, teacher.number, started).to(x.device)
            with torch.enable_grad():
                log, summary = distill(student, x, target, rope, recipe)
            file.add(teacher.number, student.named(), {**summary, "log": log})
    rows = [{**file.rows[str(block)]} for block in blocks]
    output.write_csv(args.log, [line for row in rows for line in row.pop("log")])
    output.show(f"drop distill: TP={args.ranks}, {recipe}", COLUMNS, rows)
    output.write_json(args.json, vars(args), rows)
    if args.policy_out:
        write_policy(args.policy_out, blocks, "none")
