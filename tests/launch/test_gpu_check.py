"""launch/gpu_check.sh where there is no GPU: what it would run, and what it says."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from slurm import ROOT

from megatron_comp import cli
from megatron_comp.commands import bench_codec
from megatron_comp.commands.bench_options import shape
from megatron_comp.wire.codec import Codec


@pytest.fixture
def gpu_check(tmp_path):
    """gpu_check(gpus, **environment): runs the script where nvidia-smi lists these, with this Python and no set-up."""

    def run(gpus, *arguments, **environment):
        tool = tmp_path / "bin" / "nvidia-smi"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/sh\nprintf '{gpus}'\n")
        tool.chmod(0o755)
        environment = {**os.environ, "SETUP": "0", "PYTHON": sys.executable, "OUT": f"{tmp_path}/out", **environment}
        environment["PATH"] = f"{tool.parent}:{environment['PATH']}"
        command = ["bash", ROOT / "launch" / "gpu_check.sh", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    return run


def test_gpu_check_dry_run(gpu_check, tmp_path):
    done = gpu_check("", "--repeats", "5", DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()
    (tests,) = re.findall(r"-m pytest -q -m gpu (.*)", done.stdout)
    assert "tests/wire/test_gpu.py" in tests.split() and "tests/commands/test_bench_codec.py" in tests.split()
    (options,) = re.findall(r"-m megatron_comp\.cli (.*)", done.stdout)
    args = cli._parser().parse_args(shlex.split(options))
    bytes_of = [2 * rows * hidden for rows, hidden in (shape(text, bench_codec.SHAPE) for text in args.shape)]
    assert bytes_of == [8 << 20, 64 << 10, 1 << 20, 16 << 20, 64 << 20, 256 << 20]
    assert all(Codec.parse(name) for name in args.codec)
    assert (args.device, args.ranks, args.peers, args.repeats) == ("cuda", [2, 8], True, 5)
    assert "reference" not in args.backend


def test_gpu_check_without_a_gpu(gpu_check, tmp_path):
    done = gpu_check("")
    assert done.returncode != 0
    assert done.stderr.splitlines() == ["gpu_check: there is no GPU here: nvidia-smi is missing or lists none"]
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_gpu_check_where_torch_sees_none(gpu_check, tmp_path):
    done = gpu_check("GPU 0: one\\n")
    assert done.returncode != 0
    assert re.search(r"^gpu_check: torch \S+ sees no CUDA device$", (tmp_path / "out" / "log.txt").read_text(), re.M)
    assert "[3/4]" not in done.stdout
