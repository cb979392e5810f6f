# SPDX-License-Identifier: Apache-2.0
"""What the steps of `megatron-comp drop` share: checks of their options, and how those that write weights begin."""

import argparse
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files
from ..inference.text import read_tokenizer
from ..quality.origin import origin
from . import checks, preflight
from .setup import text_of

if TYPE_CHECKING:
    from ..spd.weights import WeightsFile


def check(args: argparse.Namespace, *written: str) -> None:
    """Fails before any work on what can be seen from here. written: more options that name what is written."""
    checks.check_model(args)
    if hasattr(args, "ranks"):  # a step of one process, which no other checks
        preflight.check_inputs(args)
    checks.check_text(args)
    for option in ("sensitivity", "start", "weights", "predictor"):
        if (path := getattr(args, option, None)) and not Path(path).is_file():
            raise ValueError(f"--{option} {path}: no such file")
    if getattr(args, "tp", 2) < 2:
        raise ValueError(f"--tp {args.tp}: one rank sums nothing; 2 or more have a sum to drop")
    if hasattr(args, "timeout"):
        checks.check_timeout(args)
    checks.check_written(args, *written)


@contextmanager
def missing_blocks(
    args: argparse.Namespace, blocks: Collection[int], how: Mapping[str, object]
) -> "Iterator[tuple[Any, WeightsFile, Iterator[tuple]]]":
    """(the model's config, the file of --out, what `spd.block.stream` gives of each block that is not in that file).

    The file is this process's alone until the end. how: by which weights are made, besides model and text. Raises what
    `spd.weights.begin` raises.
    """
    from ..inference.hf import Checkpoint
    from ..spd.block import stream
    from ..spd.weights import begin

    text = text_of(args)
    with files.locked(args.out):
        config, file, missing = begin(args.model, args.ranks, args.out, blocks, {**origin(args.model, text), **how})
        with Checkpoint(args.model) as checkpoint:
            yield config, file, stream(checkpoint, config, text.windows(read_tokenizer(args.model)), missing)
