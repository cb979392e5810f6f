# SPDX-License-Identifier: Apache-2.0
"""`import megatron_comp.auto` compresses every Megatron language model that this process builds from then on.

The policy file is what MEGATRON_COMP_POLICY names. For programs that are not started by a command of one's own; where
they are, `python -m megatron_comp.run` does the same and needs no import. If no model was built when the process ends
well, it says so and ends with status 1.
"""

import atexit
import multiprocessing
import os
import sys

from .commands.rank_policy import read_policy
from .layers.hook import Hook

VARIABLE = "MEGATRON_COMP_POLICY"


def _install() -> None:
    if not (path := os.environ.get(VARIABLE)):
        raise ValueError(f"megatron_comp.auto needs {VARIABLE}, the path of a policy file")
    try:
        policy = read_policy(path)
    except OSError as error:
        raise ValueError(f"megatron_comp.auto: {VARIABLE}={path}: {error.strerror}") from None
    hook = Hook(policy)
    hook.install()
    hook.report_before_the_process_ends()
    atexit.register(_finish, hook)


def _finish(hook: Hook) -> None:
    wrong = hook.report()
    if wrong and multiprocessing.parent_process() is None:
        print(f"megatron_comp.auto: {wrong}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # the only way that is left to say it in the exit status


_install()
