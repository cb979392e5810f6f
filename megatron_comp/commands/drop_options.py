"""What the subcommands of `megatron-comp drop` share: arguments, their checks, and the text as tokens."""

import argparse
import importlib.util
from pathlib import Path

from ..inference.text import read_tokenizer
from ..launcher import output
from ..quality.windows import read_windows
from . import options

CALIBRATION_TEXT = "calibration text: not the one to be judged by"


def add_model(parser: argparse.ArgumentParser, dest: str) -> None:
    """dest: `tp` for what runs on that many ranks, another name for what only reckons with them in one process."""
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a Hugging Face Llama checkpoint")
    parser.add_argument("--tp", dest=dest, type=int, required=True, metavar="N", help="tensor-parallel ranks")


def add_ranks(parser: argparse.ArgumentParser, tokens: int) -> None:
    """Of a step that measures on ranks. tokens: of the text, if not told."""
    add_model(parser, "tp")
    options.add_text(parser, tokens, CALIBRATION_TEXT)
    options.add_dtype(parser)
    options.add_run_arguments(parser)
    parser.set_defaults(token_dispatcher="allgather")  # of a mixture of experts, whose blocks drop nothing


def add_blocks(parser: argparse.ArgumentParser, tokens: int) -> None:
    """Of a step that writes weights of blocks, in one process."""
    add_model(parser, "ranks")
    options.add_text(parser, tokens, CALIBRATION_TEXT)
    parser.add_argument("--blocks", required=True, metavar="LIST", help="layers to work on, as in 0,3-5")
    parser.add_argument("--out", required=True, metavar="FILE", help="safetensors to write their weights to")
    options.add_json(parser)


def check(args: argparse.Namespace, *files: str) -> None:
    """Fails before any work on what can be seen from here. files: options that name what is written."""
    options.check_model(args)
    options.check_text(args)
    for option in ("sensitivity", "start", "distilled"):
        if (path := getattr(args, option, None)) and not Path(path).is_file():
            raise ValueError(f"--{option} {path}: no such file")
    if getattr(args, "tp", 2) < 2:
        raise ValueError(f"--tp {args.tp}: one rank sums nothing; 2 or more have a sum to drop")
    if hasattr(args, "timeout"):
        options.check_timeout(args)
    if getattr(args, "figure", None) and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--figure needs matplotlib: pip install matplotlib, or this package with its extra 'bench'")
    for option in ("json", *files):
        output.check_file(f"--{option.replace('_', '-')}", getattr(args, option))


def windows(args: argparse.Namespace):
    """int64 `[windows, context]` from the start of the text."""
    return read_windows(args, read_tokenizer(args.model))
