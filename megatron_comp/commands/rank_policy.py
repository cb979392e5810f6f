# SPDX-License-Identifier: Apache-2.0
"""The policy of a rank that somebody else's launcher started, read before the program is."""

import os
import sys
from pathlib import Path

from ..notices import one_line
from ..policy import CompressionPolicy

# How launchers tell a process the number of ranks.
RANKS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def read_policy(path: str) -> CompressionPolicy | Path:
    """The policy of a file; beside other ranks the path itself, where reading fails.

    A rank that ended there would leave the others to wait for it, from `init_process_group` on. One that goes on tells
    them in `apply_compression`, which fails on all.

    Raises ValueError or OSError if this is the only rank.
    """
    try:
        return CompressionPolicy.from_file(path)
    except (ValueError, OSError) as error:
        if all(os.environ.get(name, "") in ("", "0", "1") for name in RANKS):
            raise
        rank, problem = os.environ.get("RANK", "?"), one_line(error)
        print(f"megatron_comp: rank {rank}: {problem}; all ranks end when the model is built", file=sys.stderr)
        return Path(path)
