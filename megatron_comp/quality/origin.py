# SPDX-License-Identifier: Apache-2.0
"""What a measurement was made of: model and text, by name and digest."""

from pathlib import Path

import torch

from ..files import digest
from ..version import __version__
from .windows import Text


def origin(model: str, text: Text) -> dict[str, object]:
    """What everything measured or made of this model's folder and this text depends on."""
    return {
        **_of_model(model),
        "text": f"{Path(text.file).name} {digest(text.file)}",
        "tokens": text.tokens,
        "context": text.context,
    }


def settings(model: str, text: Text, tp: int, dtype: torch.dtype, **more: object) -> dict[str, object]:
    """What measurements on ranks, of this model's folder and this text, depend on."""
    return {**origin(model, text), **on_ranks(model, tp, dtype), **more}


def on_ranks(model: str, tp: int, dtype: torch.dtype) -> dict[str, object]:
    """What measurements on ranks depend on, whatever the text: the model, their number, the dtype, this version."""
    of_torch = str(dtype).removeprefix("torch.")
    return {**_of_model(model), "tp": tp, "dtype": of_torch, "megatron_comp": __version__}


def _of_model(model: str) -> dict[str, object]:
    return {"model": f"{Path(model).name} {digest(Path(model, 'config.json'))}"}
