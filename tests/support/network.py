# SPDX-License-Identifier: Apache-2.0
"""What tests of slow networks share: whether they can run here, and whether a network is gone."""

import os
import time
from functools import cache
from pathlib import Path

import pytest

from megatron_comp.launcher.network import missing

# For a rank: leaves the name of its network namespace in the folder that is its first argument.
SAY_NAMESPACE = (
    "import os, sys; open(sys.argv[1] + '/' + os.environ['RANK'], 'w').write(os.readlink('/proc/self/ns/net'))"
)


@cache
def _missing():
    return missing()


def need_network():
    """Skips the test where no such network can be made."""
    if why := _missing():
        pytest.skip(why)


def namespaces(folder, ranks):
    """What the ranks have left there, once they have."""
    files = [Path(folder, str(rank)) for rank in range(ranks)]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    return {file.read_text() for file in files}


def wait_until_gone(names, seconds=30):
    """For no process to be in one of these namespaces or to hold it open; then the kernel has removed it."""
    wait_for(lambda: not _held() & names, seconds)


def _held():
    held = set()
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        for link in (Path("/proc", pid, "ns", "net"), *_listed(Path("/proc", pid, "fd"))):
            try:
                held.add(os.readlink(link))
            except OSError:  # it has ended, or belongs to somebody else
                continue
    return held


def _listed(folder):
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
