# SPDX-License-Identifier: Apache-2.0
"""A process that holds a lock of `files.locked`."""

import subprocess
import sys
from contextlib import contextmanager

HOLDER = """
import sys, time
from megatron_comp import files
with files.locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def lock_held(path):
    """The process, which is at work on `path` until the end."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()
