# SPDX-License-Identifier: Apache-2.0
"""launch/gpu_check.sh where there is no GPU: what it would run, and what it says."""

import csv
import os
import re
import shlex
import subprocess
import sys

import commands
import pytest
import torch
from slurm import ROOT

from megatron_comp import cli
from megatron_comp.commands import bench_codec
from megatron_comp.commands.checks import shape
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
    (tests,) = re.findall(r"-m pytest -q -m gpu -n 12 (.*)", done.stdout)
    assert "tests/wire/test_gpu.py" in tests.split() and "tests/commands/test_bench_codec.py" in tests.split()
    (options,) = re.findall(r"-m megatron_comp\.cli (.*)", done.stdout)
    args = cli._parser().parse_args(shlex.split(options))
    bytes_of = [2 * rows * hidden for rows, hidden in (shape(text, bench_codec.SHAPE) for text in args.shape)]
    assert bytes_of == [16 << 20, 128 << 20]
    assert len(args.codec) == 4 and all(Codec.parse(name) for name in args.codec)
    assert (args.device, args.ranks, args.peers, args.runs) == ("cuda", [2, 8], False, 5)
    assert "reference" not in args.backend
    limits = [int(seconds) for seconds in re.findall(r"^timeout --kill-after=10 (\d+)", done.stdout, re.M)]
    assert len(limits) == 4 and sum(limits) <= 8 * 60


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
    assert "[3/6]" not in done.stdout


FAKE_PYTHON = """\
#!/bin/sh
# Stands for Python: succeeds but where a step's part of its command line is to fail.
echo "ran $*"
case "$*" in
"-m pytest "*) exit 3 ;;
"-m megatron_comp.cli bench codec "*) exec sleep 60 ;;
esac
"""


def test_every_step_runs_and_the_worst_status_is_returned(gpu_check, tmp_path):
    """The tests fail, the bench hangs, and whole sums are measured none the less. Many GPUs are listed."""
    fake = tmp_path / "python"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    done = gpu_check("GPU 0: one\\n" * 5000, PYTHON=str(fake), LIMITS="5 1 5 5")
    assert done.returncode == 124, done.stdout + done.stderr
    steps = re.findall(r"^\[(\d)/6\]", done.stdout, re.M)
    assert steps == ["1", "2", "3", "4", "5", "6"]
    assert "ran tests/kernels/chain.py" in done.stdout and "ran tests/layers/stack.py" in done.stdout
    failures = re.findall(r"^gpu_check: (.*)$", (tmp_path / "out" / "log.txt").read_text(), re.M)
    assert failures == [
        "failed with status 3: tests",
        "ended at its limit of 1 s: megatron-comp bench codec",
    ]


def test_gpu_tests_need_no_megatron(gpu_check, tmp_path):
    """Without it, pytest collects the files that the script runs and writes its summary."""
    (tests,) = re.findall(r"-m pytest -q -m gpu -n 12 (.*)", gpu_check("", DRY_RUN="1").stdout)
    blocked = dict.fromkeys(("megatron", "transformers", "safetensors", "huggingface_hub", "torchao"))
    code = f"import sys; sys.modules.update({blocked}); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "-q", "-m", "gpu", "-p", "no:cacheprovider", *tests.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no Megatron-Core" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would take its time on a GPU")
def test_whole_sums_without_the_wire(tmp_path):
    """Step 5 as far as a CPU can show it: every row is there, and graphs have no figure."""
    command = [sys.executable, ROOT / "tests" / "kernels" / "chain.py", "--rows=8", "--hidden=256", "--codec=mxfp4"]
    command += ["--ranks=4", "--calls=2", "--rounds=1", "--csv", tmp_path / "sums.csv"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = commands.run(command, environment)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "sums.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["algorithm"] for row in rows] == ["copy", "gather_sum", "two_step"]
    assert all(float(row["eager_us"]) > 0 and row["graph_us"] == "" for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would take its time on a GPU")
def test_layers_with_a_wire_of_pauses(tmp_path):
    """Step 6 as far as a CPU can show it: sums are compressed, and pauses are as long as their bytes take."""
    ranks, tokens, hidden, layers, link = 4, 32, 64, 2, 1.0
    command = [sys.executable, "tests/layers/stack.py", "--codec", "mxfp4", "--csv", tmp_path / "layers.csv"]
    sizes = {"ranks": ranks, "tokens": tokens, "hidden": hidden, "layers": layers, "ffn": 128, "heads": 4, "rounds": 1}
    command += [f"--{name}={value}" for name, value in {**sizes, "link": link}.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # In a process of its own, since its pauses have to be in place before anything takes torch's collectives over.
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    stock, compressed = csv.DictReader((tmp_path / "layers.csv").open())
    assert (stock["codec"], stock["algorithm"]) == ("none", "all_reduce")
    assert (compressed["codec"], compressed["algorithm"]) == ("mxfp4", "two_step")
    sums = 2 * layers  # and one of the embedding, which is not compressed
    share, values = 2 * (ranks - 1) / ranks, tokens * hidden
    expected = [(sums + 1) * share * 2 * values, sums * share * values * 4.25 / 8 + share * 2 * values]
    found = [float(row["wire_ms"]) for row in (stock, compressed)]
    assert found == pytest.approx([nbytes / (link * 1e9 / 8) * 1e3 for nbytes in expected], abs=5e-4)
