"""What the subcommands of `megatron-comp drop` share: arguments, their checks, and the text as tokens."""

import argparse
import hashlib
import importlib.util
from pathlib import Path

from .. import output, session
from ..evaluate import read_windows

CALIBRATION_TEXT = "calibration text: not the one to be judged by"


def add_model(parser: argparse.ArgumentParser, dest: str) -> None:
    """dest: `tp` for what runs on that many ranks, another name for what only reckons with them in one process."""
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a Hugging Face Llama checkpoint")
    parser.add_argument("--tp", dest=dest, type=int, required=True, metavar="N", help="tensor-parallel ranks")


def add_ranks(parser: argparse.ArgumentParser, tokens: int) -> None:
    """Of a step that measures on ranks. tokens: of the text, if not told."""
    add_model(parser, "tp")
    session.add_text(parser, tokens, CALIBRATION_TEXT)
    session.add_dtype(parser)
    session.add_run_arguments(parser)
    parser.set_defaults(token_dispatcher="allgather")  # of a mixture of experts, whose blocks drop nothing


def add_blocks(parser: argparse.ArgumentParser, tokens: int) -> None:
    """Of a step that writes weights of blocks, in one process."""
    add_model(parser, "ranks")
    session.add_text(parser, tokens, CALIBRATION_TEXT)
    parser.add_argument("--blocks", required=True, metavar="LIST", help="layers to work on, as in 0,3-5")
    parser.add_argument("--out", required=True, metavar="FILE", help="safetensors to write their weights to")
    session.add_json(parser)


def check(args: argparse.Namespace, *files: str) -> None:
    """Fails before any work on what can be seen from here. files: options that name what is written."""
    session.check_model(args)
    session.check_text(args)
    for option in ("sensitivity", "start", "distilled"):
        if (path := getattr(args, option, None)) and not Path(path).is_file():
            raise ValueError(f"--{option} {path}: no such file")
    if getattr(args, "tp", 2) < 2:
        raise ValueError(f"--tp {args.tp}: one rank sums nothing; 2 or more have a sum to drop")
    if hasattr(args, "timeout"):
        session.check_timeout(args)
    if getattr(args, "figure", None) and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--figure needs matplotlib: pip install matplotlib, or this package with its extra 'bench'")
    for option in ("json", *files):
        output.check_file(f"--{option.replace('_', '-')}", getattr(args, option))


def windows(args: argparse.Namespace):
    """int64 `[windows, context]` from the start of the text."""
    return read_windows(args, session.read_tokenizer(args.model))


def origin(args: argparse.Namespace) -> dict[str, object]:
    """What everything measured or made of this model and this text depends on."""
    return {
        "model": f"{Path(args.model).name} {digest(Path(args.model, 'config.json'))}",
        "text": f"{Path(args.text).name} {digest(args.text)}",
        "tokens": args.tokens,
        "context": args.context,
    }


def digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def check_blocks(blocks: list[int], config) -> None:
    """Raises ValueError for a layer that the model does not have."""
    if blocks[-1] >= config.num_hidden_layers:
        raise ValueError(f"--blocks: the model has layers 0 to {config.num_hidden_layers - 1}, not {blocks[-1]}")
