# SPDX-License-Identifier: Apache-2.0
"""How far a command is: a bar in a terminal, and elsewhere, as in a log, a line now and then."""

import sys
import time

from tqdm import tqdm

from .output import is_first_rank

FIRST_SECONDS, LONGEST_SECONDS = 2.0, 60.0  # to the first line, and between two lines of a long run
LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def progress(*args: object, **how: object) -> tqdm:
    """A `tqdm` of these arguments, which shows on the first rank alone."""
    if not is_first_rank():
        return tqdm(*args, **how, disable=True)
    if sys.stderr.isatty():
        return tqdm(*args, **how)
    return tqdm(*args, **how, file=_Lines(), bar_format=LINE)


class _Lines:
    """Writes what tqdm draws as lines of standard error, with pauses that double."""

    def __init__(self) -> None:
        self._pause = FIRST_SECONDS
        self._due = time.monotonic() + self._pause

    def write(self, text: str) -> None:
        if (line := text.strip()) and time.monotonic() >= self._due:
            print(line, file=sys.stderr, flush=True)
            self._pause = min(2 * self._pause, LONGEST_SECONDS)
            self._due = time.monotonic() + self._pause

    def flush(self) -> None:
        pass  # every line is flushed
