# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp predictor fit`: predictors of a model's sums."""

import argparse

from .. import files
from ..launcher import output
from . import drop_options, options

DESCRIPTION = """\
Find, for each sum of a Llama, which part of it follows from the block's input: least squares of low rank on a
calibration text. Each predictor is checked on the last windows of the text, which the regression does not see; one that
leaves more than --most-left of a sum's energy is not written. This runs in one process: the model's layers pass through
memory one by one, with the activations of the whole text. Every finished layer is written; after an interruption the
same command goes on behind the last one.
"""
EPILOG = """\
Example:
  megatron-comp predictor fit --model llama --tp 4 --text calibration.txt --out llama-tp4.predictor.safetensors

A policy uses the file with `predictor: llama-tp4.predictor.safetensors`. Judge it by `megatron-comp evaluate --policy`,
on a text of another kind.
"""

COLUMNS = {
    "block": ("layer", "d"),
    "attention_left": ("attention: left", ".3f"),
    "mlp_left": ("MLP: left", ".3f"),
    "written": ("written", ""),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser, drop_options.MODEL)
    options.add_tp(parser, "ranks", "Number of tensor-parallel ranks that the predictors are for.")
    options.add_text(parser, 16384, drop_options.CALIBRATION_TEXT)
    add = parser.add_argument
    add(
        "--rank",
        type=int,
        default=64,
        metavar="K",
        help="Values per token that predict a sum (default 64). Prefill pays 3 x K x hidden multiplications for each.",
    )
    add(
        "--most-left",
        type=float,
        default=0.95,
        metavar="SHARE",
        help="Write a predictor only if at most this share of its sum's energy is left (default 0.95).",
    )
    add(
        "--unseen", type=float, default=0.2, metavar="SHARE", help="Share of the windows that only check (default 0.2)."
    )
    add("--out", required=True, metavar="FILE", help="The safetensors file to write the predictors to.")
    options.add_json(parser)


def check(args: argparse.Namespace) -> None:
    drop_options.check(args, "out")
    options.at_least_one(args, "rank")
    for option in ("most_left", "unseen"):
        if not 0 < getattr(args, option) < 1:
            raise ValueError(
                f"--{option.replace('_', '-')} {getattr(args, option)}: allowed are numbers above 0 and below 1"
            )
    if args.tokens // args.context < 2:
        raise ValueError(f"--tokens {args.tokens}: at least two windows of --context {args.context} are needed")


def run(args: argparse.Namespace) -> None:
    check(args)
    with files.locked(args.out):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ..inference import hf
    from ..layers.predictor import name
    from ..spd.block import stream
    from ..spd.regression import fit_block
    from ..spd.weights import begin

    layers = list(range(hf.read_config(args.model).num_hidden_layers))
    how = {"rank": args.rank, "most_left": args.most_left, "unseen": args.unseen}
    config, file, missing = begin(args, layers, how)
    if args.rank > config.hidden_size:
        raise ValueError(f"--rank {args.rank}: the model has {config.hidden_size} values per token")
    windows = drop_options.windows(args)
    unseen = max(1, round(len(windows) * args.unseen))
    with hf.Checkpoint(args.model) as own:
        blocks = stream(own, config, windows, missing)
        for block, x, _, rope in tqdm(blocks, "predictor fit", len(missing), unit="layer"):
            found = fit_block(block, x, rope, args.ranks, args.rank, unseen)
            kept = {site: each for site, each in found.items() if each.left <= args.most_left}
            tensors = {
                f"{name(block.number, site)}.{part}": getattr(each, part).bfloat16()
                for site, each in kept.items()
                for part in ("down", "up", "bias")
            }
            left = {f"{site}_left": each.left for site, each in found.items()}
            file.add(block.number, tensors, {"block": block.number, **left, "written": ", ".join(kept) or "none"})
    rows = [file.rows[str(layer)] for layer in layers]
    output.show(f"predictor fit: rank {args.rank}, TP={args.ranks}", COLUMNS, rows)
    output.write_json(args.json, vars(args), rows)
