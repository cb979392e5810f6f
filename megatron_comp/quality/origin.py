# SPDX-License-Identifier: Apache-2.0
"""What a measurement was made of: model and text, by name and digest."""

import argparse
import hashlib
from pathlib import Path

import torch

from ..version import __version__


def origin(args: argparse.Namespace) -> dict[str, object]:
    """What everything measured or made of this model and this text depends on."""
    return {
        "model": f"{Path(args.model).name} {digest(Path(args.model, 'config.json'))}",
        "text": f"{Path(args.text).name} {digest(args.text)}",
        "tokens": args.tokens,
        "context": args.context,
    }


def settings(args: argparse.Namespace, dtype: torch.dtype, **more: object) -> dict[str, object]:
    """What measurements on ranks depend on: also their number, the dtype, and this package's version."""
    measured = {"tp": args.tp, "dtype": str(dtype).removeprefix("torch."), "megatron_comp": __version__}
    return {**origin(args), **measured, **more}


def digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
