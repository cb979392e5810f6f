# SPDX-License-Identifier: Apache-2.0
"""What tests of `megatron-comp search` share: its command line, and its ranks."""

import contextlib
import csv
import io
import os

from ranks import run_ranks

from megatron_comp import cli
from megatron_comp.quality import journal

CODECS = ("int3:32:e5m3", "int4:32:e5m3", "int5:16:e5m3", "int6:32:e5m3", "int8:32:e5m3")
LENGTH = ("--tokens", "128", "--context", "64")


def rank_of_command(rank, world_size, folder, arguments, saves):
    """One rank of the command, in `folder`; interrupted when more than `saves` measurements are to be kept."""
    os.chdir(folder)
    keep, left = journal.Journal.keep, iter(range(saves))

    def keep_or_end(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return keep(*arguments)

    journal.Journal.keep = keep_or_end
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = cli.main(arguments)
    return status, said.getvalue()


def ranks_of_command(folder, *arguments, saves=1000):
    """(status, what rank 0 said) of `megatron-comp arguments` on two ranks, which end alike."""
    arguments = [str(word) for word in arguments]
    (status, said), (other, _) = run_ranks(rank_of_command, 2, str(folder), arguments, saves, init=False)
    assert status == other, said
    return status, said


def search(folder, llama, text, *arguments, saves=1000):
    files = ["--out", "policy.yaml", "--csv", "rows.csv", "--state", "state.json"]
    words = ["search", "--model", llama, "--tp", 2, "--text", text, *LENGTH, *files, *arguments]
    return ranks_of_command(folder, *words, saves=saves)


def rows_of(folder):
    with open(folder / "rows.csv") as file:
        return list(csv.DictReader(file))
