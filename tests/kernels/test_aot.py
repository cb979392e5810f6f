# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for GPUs that need not be here, within the budgets of registers, spills and accesses.

A child process (aot.py) compiles what `wire/gpu.py` launches: this process runs Triton's interpreter, and a compiler
that fails may end its process. Seconds once the cache folder holds the kernels. Here are an oldest and a newer NVIDIA
architecture, an AMD one, and the oldest Triton that serves; `python tests/kernels/aot.py` does all targets and codecs.
"""

import os
import subprocess
import sys
from pathlib import Path

CHILD = Path(__file__).with_name("aot.py")
REPO = CHILD.parents[2]
CODECS = ["mxfp4", "nvfp4", "int4:32:fp16:hadamard", "lloyd4:32:e5m3"]


def compile_all(targets, cache, triton=None):
    """The last line that aot.py prints. `triton`: a folder to take it from."""
    command = [sys.executable, CHILD]
    for option, values in {"--target": targets, "--codec": CODECS}.items():
        command += [word for value in values for word in (option, value)]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    path = [str(triton)] if triton else []
    environment["PYTHONPATH"] = os.pathsep.join([*path, str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
    # A compiler in trouble prints whole programs; their end says why.
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    return result.stdout.splitlines()[-1]


def test_installed_triton(compiled_kernels):
    targets = ["sm_80", "sm_90", "gfx942"]
    kernels = len(targets) * 3 * len(CODECS)
    assert f": {kernels} kernels, 0 complaints" in compile_all(targets, compiled_kernels)


def test_oldest_triton(compiled_kernels, triton_release):
    """The one that torch 2.11 comes with."""
    said = compile_all(["sm_90"], compiled_kernels, triton_release("3.6.0"))
    assert said == f"Triton 3.6.0: {3 * len(CODECS)} kernels, 0 complaints"
