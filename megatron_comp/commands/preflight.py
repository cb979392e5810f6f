# SPDX-License-Identifier: Apache-2.0
"""What can be known before ranks start, of the environment and of the model's folder; within a second, without torch.

Files that a command writes are checked by `output.check_file`, options by the command's own `check`.
"""

import argparse
from pathlib import Path

from ..inference import config, environment, model_files, shards
from ..inference.text import named_stops


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


def check_model(args: argparse.Namespace) -> None:
    """Raises ValueError or FileNotFoundError that names file, key, value and what is allowed, for a folder of --model
    that cannot be read, or not on --tp ranks and in --pp stages."""
    if not isinstance(getattr(args, "model", None), str) or not Path(args.model).is_dir():
        return
    folder = Path(args.model)
    raw = config.read_raw(folder)
    if (sizes := config.sizes(raw)) is not None and isinstance(getattr(args, "tp", None), int):
        shards.check_tensor_parallel(sizes, args.tp)
        shards.check_pipeline_parallel(sizes, getattr(args, "pp", 1))
    model_files.check_weights(folder)
    if hasattr(args, "token_dispatcher"):  # a command that runs the model, with its tokenizer
        model_files.check_tokenizer(folder)
        named_stops(folder)
