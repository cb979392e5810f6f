# SPDX-License-Identifier: Apache-2.0
"""Random input for some seconds; `fuzz.py` and `soak.py` beside this file do the same for as long as one likes."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_comp.wire import native

HERE = Path(__file__).parent
pytestmark = pytest.mark.fuzz


def sanitizer():
    """Whether the compiler has the sanitizers, as fuzz.py asks."""
    if not native.compiler():
        return False
    asked = subprocess.run([*native.compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True)
    return asked.stdout.startswith("/")


def run(file, *arguments):
    return subprocess.run([sys.executable, HERE / file, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(not sanitizer(), reason="needs gcc with its address sanitizer")
def test_the_c_code_under_sanitizers():
    done = run("fuzz.py", "--minutes", "0.1")
    assert done.returncode == 0, done.stdout + done.stderr
    calls = int(done.stdout.split(" calls")[0].split()[-1])
    assert calls > 50 and done.stdout.rstrip().endswith("none differs")


@pytest.mark.skipif(not sanitizer(), reason="needs gcc with its address sanitizer")
def test_one_byte_too_many_is_noticed():
    done = run("fuzz.py", "--overrun")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stdout and "nothing was noticed" not in done.stdout


def test_random_sums():
    done = run("soak.py", "--minutes", "0.25")
    assert done.returncode == 0, done.stdout + done.stderr
    sums = int(done.stdout.split(" sums on")[0].split()[-1])
    assert sums >= 40 and done.stdout.rstrip().endswith("none differs, nothing grew")
