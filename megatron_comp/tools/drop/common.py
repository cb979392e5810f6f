"""What the subcommands of `megatron-comp drop` share: arguments, their checks, and the text as tokens."""

import argparse
import hashlib
import importlib.util
from pathlib import Path

from .. import output, session
from ..evaluate import read_windows


def add_model(parser: argparse.ArgumentParser, dest: str) -> None:
    """dest: `tp` for what runs on that many ranks, another name for what only reckons with them in one process."""
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a Hugging Face Llama checkpoint")
    parser.add_argument("--tp", dest=dest, type=int, required=True, metavar="N", help="tensor-parallel ranks")
    parser.add_argument("--json", metavar="FILE", help="write config, versions and rows there as one JSON object")


def add_text(parser: argparse.ArgumentParser, tokens: int) -> None:
    parser.add_argument("--text", required=True, metavar="FILE", help="calibration text: not the one to be judged by")
    parser.add_argument("--tokens", type=int, default=tokens, metavar="K", help=f"how much of it (default {tokens})")
    parser.add_argument("--context", type=int, default=512, metavar="L", help="in windows of so many (default 512)")


def add_ranks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=session.DTYPES, default="auto", help="auto: bfloat16 on a GPU, else float32")
    parser.add_argument(
        "--timeout",
        type=float,
        default=300,
        metavar="SECONDS",
        help="after which a rank that hears nothing from another fails (default 300)",
    )
    parser.set_defaults(token_dispatcher="allgather")  # of a mixture of experts, whose blocks drop nothing


def check(args: argparse.Namespace, *files: str) -> None:
    """Fails before any work on what can be seen from here. files: options that name what is written."""
    if not Path(args.model).is_dir():
        raise ValueError(f"--model {args.model}: no such folder")
    if not Path(args.text).is_file():
        raise ValueError(f"--text {args.text}: no such file")
    for option in ("sensitivity", "start", "distilled"):
        if (path := getattr(args, option, None)) and not Path(path).is_file():
            raise ValueError(f"--{option} {path}: no such file")
    if not 2 <= args.context <= args.tokens:
        raise ValueError(f"--context {args.context}: allowed are 2 to --tokens {args.tokens}")
    if getattr(args, "tp", 2) < 2:
        raise ValueError(f"--tp {args.tp}: one rank sums nothing; 2 or more have a sum to drop")
    if not 0 < getattr(args, "timeout", 1) < 1e7:
        raise ValueError(f"--timeout {args.timeout}: allowed are seconds above 0 and below 10 million")
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
