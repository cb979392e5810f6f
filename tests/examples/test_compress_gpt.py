# SPDX-License-Identifier: Apache-2.0
"""examples/compress_gpt.py, started as its docstring says."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "examples" / "compress_gpt.py"


def test_it_runs_as_printed():
    (printed,) = re.findall(r' torchrun (.*)"""$', SCRIPT.read_text(), re.M)
    command = [sys.executable, "-m", "torch.distributed.run", *shlex.split(printed)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    counted = r"8 sums compressed \(\w+ 8\), 0 uncompressed, 4\.50 bits per value, [\d,]+ bytes received"
    line = re.fullmatch(rf"{counted}.*; logits differ by (\d+\.\d)%\n", done.stdout)
    assert line, done.stdout  # two sums in each of four layers
    assert 2 < float(line[1]) < 30
