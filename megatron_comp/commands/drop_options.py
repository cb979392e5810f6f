# SPDX-License-Identifier: Apache-2.0
"""What the steps of `megatron-comp drop` share: options, their checks, and the text as tokens."""

import argparse
from pathlib import Path

from ..inference.text import read_tokenizer
from ..quality.windows import read_windows
from . import checks, preflight


def check(args: argparse.Namespace, *files: str) -> None:
    """Fails before any work on what can be seen from here. files: more options that name what is written."""
    checks.check_model(args)
    if hasattr(args, "ranks"):  # a step of one process, which no other checks
        preflight.check_inputs(args)
    checks.check_text(args)
    for option in ("sensitivity", "start", "weights"):
        if (path := getattr(args, option, None)) and not Path(path).is_file():
            raise ValueError(f"--{option} {path}: no such file")
    if getattr(args, "tp", 2) < 2:
        raise ValueError(f"--tp {args.tp}: one rank sums nothing; 2 or more have a sum to drop")
    if hasattr(args, "timeout"):
        checks.check_timeout(args)
    checks.check_written(args, *files)


def windows(args: argparse.Namespace):
    """int64 `[windows, context]` from the start of the text."""
    return read_windows(args, read_tokenizer(args.model))
