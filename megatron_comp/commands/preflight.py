# SPDX-License-Identifier: Apache-2.0
"""What can be known before ranks start, of the environment and of the model's folder; within a second, without torch.

Files that a command writes are checked by `output.check_file`, options by the command's own `check`.
"""

import argparse
from pathlib import Path

from ..inference import config, environment, model_files, shards
from ..inference.text import named_stops


def check_environment(args: argparse.Namespace) -> None:
    """Raises ValueError, before this process takes itself for a rank, for a WORLD_SIZE that no launcher has set."""
    started, tp = environment.world_size(), getattr(args, "tp", None)
    if started is not None and isinstance(tp, int) and started != tp:
        raise ValueError(
            f"--tp is {tp}, but the environment says WORLD_SIZE={started}: start {tp} ranks with torchrun, or "
            "`unset WORLD_SIZE` to start without a launcher"
        )


def check_model(args: argparse.Namespace) -> None:
    """Raises ValueError or FileNotFoundError that names file, key, value and what is allowed, for a folder of --model
    that cannot be read, or not on --tp ranks."""
    if not isinstance(getattr(args, "model", None), str) or not Path(args.model).is_dir():
        return
    folder = Path(args.model)
    raw = config.read_raw(folder)
    if (sizes := config.sizes(raw)) is not None and isinstance(getattr(args, "tp", None), int):
        shards.check_tensor_parallel(sizes, args.tp)
    model_files.check_weights(folder)
    if hasattr(args, "token_dispatcher"):  # a command that runs the model, with its tokenizer
        model_files.check_tokenizer(folder)
        named_stops(folder)
