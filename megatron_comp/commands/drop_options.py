# SPDX-License-Identifier: Apache-2.0
"""What the steps of `megatron-comp drop` share: options, their checks, and the text as tokens."""

import argparse
from pathlib import Path

from ..inference.text import read_tokenizer
from ..quality.windows import read_windows
from . import options, preflight

MODEL = "Folder of a Hugging Face Llama checkpoint."
CALIBRATION_TEXT = "A calibration text. Judge the result by another one."


def add_ranks(parser: argparse.ArgumentParser, tokens: int) -> None:
    """Of a step that measures on ranks. tokens: of the text, if not told."""
    options.add_model(parser, MODEL)
    options.add_tp(parser)
    options.add_text(parser, tokens, CALIBRATION_TEXT)
    options.add_dtype(parser)
    options.add_run_arguments(parser)
    parser.set_defaults(token_dispatcher="allgather")  # of a mixture of experts, whose blocks drop nothing


def add_blocks(parser: argparse.ArgumentParser, tokens: int) -> None:
    """Of a step that writes weights of blocks, in one process."""
    options.add_model(parser, MODEL)
    options.add_tp(parser, "ranks", "Number of tensor-parallel ranks that the weights are for.")
    options.add_text(parser, tokens, CALIBRATION_TEXT)
    parser.add_argument("--blocks", required=True, metavar="LIST", help="The layers to work on, as in 0,3-5.")
    parser.add_argument("--out", required=True, metavar="FILE", help="The safetensors file to write their weights to.")
    options.add_json(parser)


def check(args: argparse.Namespace, *files: str) -> None:
    """Fails before any work on what can be seen from here. files: more options that name what is written."""
    options.check_model(args)
    if hasattr(args, "ranks"):  # a step of one process, which no other checks
        preflight.check_inputs(args)
    options.check_text(args)
    for option in ("sensitivity", "start", "weights"):
        if (path := getattr(args, option, None)) and not Path(path).is_file():
            raise ValueError(f"--{option} {path}: no such file")
    if getattr(args, "tp", 2) < 2:
        raise ValueError(f"--tp {args.tp}: one rank sums nothing; 2 or more have a sum to drop")
    if hasattr(args, "timeout"):
        options.check_timeout(args)
    options.check_written(args, *files)


def windows(args: argparse.Namespace):
    """int64 `[windows, context]` from the start of the text."""
    return read_windows(args, read_tokenizer(args.model))
