"""Options and circumstances that benches share."""

import argparse
import importlib.util
import re
from pathlib import Path

from ..launcher import output


def add_files(parser: argparse.ArgumentParser, drawn: str, json: bool = True) -> None:
    """`--json`, unless the parser has it, `--csv` and `--figure`, which draws what is `drawn`."""
    if json:
        parser.add_argument("--json", metavar="FILE", help="write config, versions and rows there as one JSON object")
    parser.add_argument("--csv", metavar="FILE", help="write the rows there, with device, versions and date")
    parser.add_argument("--figure", metavar="FILE", help=f"draw {drawn} there: .png or .svg; needs matplotlib")


def check_files(args: argparse.Namespace) -> None:
    """Before anything is measured. Raises ValueError that names the option."""
    for option in ("json", "csv", "figure"):
        output.check_file(f"--{option}", getattr(args, option))
    if args.figure and Path(args.figure).suffix not in (".png", ".svg"):
        raise ValueError(f"--figure {args.figure}: allowed are names that end in .png or .svg")
    if args.figure and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--figure needs matplotlib: pip install matplotlib, or this package with its extra 'bench'")


def at_least_one(args: argparse.Namespace, *options: str) -> None:
    """Raises ValueError for the first of these options whose number is less."""
    for option in options:
        if getattr(args, option) < 1:
            raise ValueError(f"--{option.replace('_', '-')} {getattr(args, option)}: at least one is needed")


def shape(text: str, example: str) -> tuple[int, int]:
    """Of `ROWSxHIDDEN`."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise ValueError(f"--shape {text}: expected ROWSxHIDDEN, both at least 1, as in {example}")
    rows, hidden = text.split("x")
    return int(rows), int(hidden)
