# SPDX-License-Identifier: Apache-2.0
"""Checks of options that several subcommands share: before any work, with one clear line that names the option."""

import argparse
import re
from pathlib import Path

from ..files import shown
from ..launcher import output
from .options import context_of

MOST = 10**9  # of anything that is counted: products of such numbers still fit a float


def check_text(args: argparse.Namespace) -> None:
    """Settles --context where it is not given."""
    args.context = context_of(args)
    if args.tokens < 2:
        raise ValueError(f"--tokens {args.tokens}: two are needed at least, to predict the second")
    if not 2 <= args.context <= args.tokens:
        raise ValueError(f"--context {args.context}: allowed are 2 to --tokens {args.tokens}")
    if not Path(args.text).is_file():
        raise ValueError(f"--text {args.text}: no such file")


def check_timeout(args: argparse.Namespace) -> None:
    if not 0 < args.timeout < 1e7:
        raise ValueError(f"--timeout {args.timeout}: allowed are seconds above 0 and below 10 million")


def check_written(args: argparse.Namespace, *names: str) -> None:
    """Before any work. names: of the options, besides `--json`, `--csv`, `--figure` and `--state`, of files to write.

    Raises ValueError that names the option.
    """
    for name in ("json", "csv", "figure", *names):
        output.check_file(f"--{name.replace('_', '-')}", getattr(args, name, None))
    output.check_resumed("--state", getattr(args, "state", None))
    if (figure := getattr(args, "figure", None)) and Path(figure).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--figure {figure}: allowed are names that end in .png, .svg or .pdf")


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Raises ValueError for the first of these options whose number is below 1 or above MOST."""
    for name in names:
        option, number = f"--{name.replace('_', '-')}", getattr(args, name)
        if number < 1:
            raise ValueError(f"{option} {number}: at least one is needed")
        if number > MOST:
            raise ValueError(f"{option} {shown(number)}: at most {MOST:,} are allowed")


def shape(text: str, example: str) -> tuple[int, int]:
    """Of `ROWSxHIDDEN`."""
    if not re.fullmatch(r"[1-9][0-9]{0,8}x[1-9][0-9]{0,8}", text):
        raise ValueError(f"--shape {text}: expected ROWSxHIDDEN, both from 1 to 999999999, as in {example}")
    rows, hidden = text.split("x")
    return int(rows), int(hidden)


def check_files(args: argparse.Namespace) -> None:
    """Fails before any rank starts on what can be seen from here."""
    if args.tp < 1:
        raise ValueError(f"--tp {args.tp}: at least one rank is needed")
    if getattr(args, "pp", 1) < 1:
        raise ValueError(f"--pp {args.pp}: at least one stage is needed")
    check_model(args)
    check_timeout(args)
    check_written(args)
    if getattr(args, "weights", None) and not Path(args.weights).is_file():
        raise ValueError(f"--weights {args.weights}: no such file")


def check_model(args: argparse.Namespace) -> None:
    if not Path(args.model).is_dir():
        raise ValueError(f"--model {args.model}: no such folder")
