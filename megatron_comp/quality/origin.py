# SPDX-License-Identifier: Apache-2.0
"""What a measurement was made of: model and text, by name and digest."""

import hashlib
from pathlib import Path

import torch

from ..version import __version__
from .windows import Text


def origin(model: str, text: Text) -> dict[str, object]:
    """What everything measured or made of this model's folder and this text depends on."""
    return {
        "model": f"{Path(model).name} {digest(Path(model, 'config.json'))}",
        "text": f"{Path(text.file).name} {digest(text.file)}",
        "tokens": text.tokens,
        "context": text.context,
    }


def settings(model: str, text: Text, tp: int, dtype: torch.dtype, **more: object) -> dict[str, object]:
    """What measurements on ranks depend on: also their number, the dtype, and this package's version."""
    measured = {"tp": tp, "dtype": str(dtype).removeprefix("torch."), "megatron_comp": __version__}
    return {**origin(model, text), **measured, **more}


def digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
