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
        **_of_model(args),
        "text": f"{Path(args.text).name} {digest(args.text)}",
        "tokens": args.tokens,
        "context": args.context,
    }


def settings(args: argparse.Namespace, dtype: torch.dtype, **more: object) -> dict[str, object]:
    """What measurements on ranks, of this model and this text, depend on."""
    return {**origin(args), **on_ranks(args, dtype), **more}


def on_ranks(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, object]:
    """What measurements on ranks depend on, whatever the text: the model, their number, the dtype, this version."""
    dtype = str(dtype).removeprefix("torch.")
    return {**_of_model(args), "tp": args.tp, "dtype": dtype, "megatron_comp": __version__}


def _of_model(args: argparse.Namespace) -> dict[str, object]:
    return {"model": f"{Path(args.model).name} {digest(Path(args.model, 'config.json'))}"}


def digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
