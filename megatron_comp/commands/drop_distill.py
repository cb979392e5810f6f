# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp drop distill`: weights for blocks without attention's sum."""

import argparse

import torch

from ..files import digest
from ..launcher import output
from ..spd.blocks import parse_blocks, write_policy
from . import drop_options

COLUMNS = {
    "block": ("block", "d"),
    "relative_before": ("error before", ".4f"),
    "relative_after": ("after", ".4f"),
    "mse_before": ("mse before", ".4g"),
    "mse_after": ("after", ".4g"),
    "seconds": ("s", ".1f"),
}


def check(args: argparse.Namespace) -> list[int]:
    drop_options.check(args, "out", "policy_out", "log")
    for option in ("epochs", "batch"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option} {getattr(args, option)}: at least 1 is needed")
    if not 0 < args.learning_rate < 1:
        raise ValueError(f"--learning-rate {args.learning_rate}: allowed are numbers above 0 and below 1")
    return parse_blocks(args.blocks)


def run(args: argparse.Namespace) -> None:
    from ..inference import hf
    from ..layers.predictor_file import read_regressions
    from ..spd.block import Block, check_can_drop
    from ..spd.training import Recipe, distill

    blocks = check(args)
    recipe = Recipe(args.ranks, args.epochs, args.batch, args.learning_rate, args.loss, args.seed)
    read_from = {option: digest(path) for option in ("start", "predictor") if (path := getattr(args, option))}
    with drop_options.missing_blocks(args, blocks, {"recipe": str(recipe), **read_from}) as (config, file, teachers):
        check_can_drop(config)
        predictors = read_regressions(args.predictor, args.ranks, config.hidden_size) if args.predictor else {}
        if args.predictor and not any((block, "attention") in predictors for block in blocks):
            raise ValueError(f"--predictor {args.predictor}: predicts attention's sum in none of layers {args.blocks}")
        if args.start:
            hf.check_extra(args.start, args.ranks)
        with hf.Checkpoint(args.model, args.start) as started:
            for teacher, x, target, rope in teachers:
                student = Block(config, teacher.number, started).to(x.device)
                predictor = predictors.get((teacher.number, "attention"))
                with torch.enable_grad():
                    log, summary = distill(student, x, target, rope, recipe, predictor and predictor.to(x))
                file.add(teacher.number, student.named(), {**summary, "log": log})
    rows = [{**file.rows[str(block)]} for block in blocks]
    output.write_csv(args.log, [line for row in rows for line in row.pop("log")])
    output.show(f"drop distill: TP={args.ranks}, {recipe}", COLUMNS, rows)
    output.write_json(args.json, vars(args), rows)
    if args.policy_out:
        write_policy(args.policy_out, blocks, "none", args.predictor)
