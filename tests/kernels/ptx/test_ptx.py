# SPDX-License-Identifier: Apache-2.0
"""The kernels as compiled write the reference's bytes, and nothing beside them: executed on a CPU (device.py).

Each test starts a process, because Triton's driver is replaced in it. `python tests/kernels/ptx/matrix.py` runs all
cases, `mutants.py` shows that the checks find broken kernels.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REPO = HERE.parents[2]
# Read, not imported: this process interprets the kernels that mutants.py compiles.
MUTANTS = re.findall(r'^    "(.+)": Mutant\(', (HERE / "mutants.py").read_text(), re.MULTILINE)

pytestmark = pytest.mark.skipif(
    not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))),
    reason="needs a C compiler for the stub of libcuda",
)


def run(script, *arguments, cache):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    environment["PYTHONPATH"] = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, HERE / script, *arguments], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    return result.stdout.splitlines()


@pytest.mark.parametrize("part", ["shapes", "presets", "options"])
def test_bytes_of_the_reference(part, compiled_kernels):
    assert " 0 failed" in run("matrix.py", "--suite", part, cache=compiled_kernels)[-1]


def test_older_gpu(compiled_kernels):
    """sm_80 has other instructions: no stmatrix, other conversions."""
    arguments = ["--capability", "80", "--suite", "shapes", "--suite", "presets", "--every", "3"]
    assert " 0 failed" in run("matrix.py", *arguments, cache=compiled_kernels)[-1]


@pytest.mark.parametrize("names", [MUTANTS[::2], MUTANTS[1::2]], ids=["half", "other half"])
def test_broken_kernels_are_found(names, compiled_kernels):
    lines = run("mutants.py", *names, cache=compiled_kernels)
    assert {line.partition(":")[0].rstrip(" 0123456789") for line in lines} == {*names}
    assert not [line for line in lines if "NOT FOUND" in line]


def test_nothing_is_left_to_compile(compiled_kernels):
    lines = run("warm_up.py", cache=compiled_kernels)
    assert len(lines) == 10 and all(line.endswith(" 0 in sums") for line in lines)
    assert sum(int(line.partition(": ")[2].split()[0]) for line in lines) > 9  # kernels that were compiled


def test_missing_compiler(tmp_path):
    (error,) = run("warm_up.py", "--without-compiler", cache=tmp_path)
    assert error.startswith("the kernels of codec fp4_e2m1:32:e8m0 cannot be compiled for cpu: FileNotFoundError")
    assert "needs a C compiler" in error and "MEGATRON_COMP_BACKEND=reference" in error
