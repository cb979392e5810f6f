# SPDX-License-Identifier: Apache-2.0
"""What can be known before ranks start, of the environment and of what a command reads; within a second, without torch.

Files that a command writes are checked by `output.check_file`, options by the command's own `check`.
"""

import argparse
from pathlib import Path

from ..inference import config, environment, model_files, shards
from ..inference.text import check_length, named_stops
from .options import context_of


def ranks_of(args: argparse.Namespace) -> int:
    """How many ranks a command with --tp, and perhaps --pp, runs on."""
    return args.tp * getattr(args, "pp", 1)


def check_environment(args: argparse.Namespace) -> None:
    """Raises ValueError, before this process takes itself for a rank, for a WORLD_SIZE that no launcher has set."""
    started = environment.world_size()
    if started is not None and isinstance(getattr(args, "tp", None), int) and started != (asked := ranks_of(args)):
        said = f"--tp is {args.tp}" + (f" and --pp {args.pp}" if asked != args.tp else "")
        raise ValueError(
            f"{said}, but the environment says WORLD_SIZE={started}: start {asked} ranks with torchrun, or "
            "`unset WORLD_SIZE` to start without a launcher"
        )


def check_inputs(args: argparse.Namespace) -> None:
    """Of the model, of weights that take the place of its own, and of the text; those that do not exist are the
    command's own to name. Raises ValueError or FileNotFoundError that names file, key, value and what is allowed."""
    _check_model(args)
    for name in ("weights", "distilled", "start"):
        if (path := getattr(args, name, None)) and Path(path).is_file():
            model_files.check_safetensors(Path(path))
    if (path := getattr(args, "text", None)) and Path(path).is_file():
        context = context_of(args)
        check_length(path, args.tokens // context * context if context > 0 else 0)


def _check_model(args: argparse.Namespace) -> None:
    """Raises ValueError or FileNotFoundError that names file, key, value and what is allowed, for a folder of --model
    that cannot be read, or not on --tp ranks and in --pp stages."""
    if not isinstance(getattr(args, "model", None), str) or not Path(args.model).is_dir():
        return
    folder = Path(args.model)
    raw = config.read_raw(folder)
    tp = getattr(args, "tp", getattr(args, "ranks", None))
    pp = getattr(args, "pp", 1)
    sizes = config.sizes(raw)
    if sizes is not None and isinstance(tp, int) and min(tp, pp) >= 1:
        shards.check_tensor_parallel(sizes, tp)
        shards.check_pipeline_parallel(sizes, pp)
    if any(getattr(args, name, None) for name in ("blocks", "weights", "distilled")):
        model_files.check_read_by_layer(folder)
    found = model_files.check_weights(folder)
    if sizes is not None and found:
        shards.check_shapes(sizes, found, folder / "config.json")
    if {"token_dispatcher", "text"} & vars(args).keys():  # a command that runs the model, or reads a text
        model_files.check_tokenizer(folder)
        named_stops(folder)
