"""`ranks.start` with commands of a few lines: what comes back, and that nobody stays behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_comp.tools import ranks

REPORT = "from megatron_comp.tools.ranks import report; import os, sys; rank = os.environ['RANK']; "


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def start(code, count=3):
    return ranks.start(count, [sys.executable, "-c", code])


def test_every_rank_runs_in_the_environment_of_a_launcher(tmp_path):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    code = f"import os; open(r'{tmp_path}/' + os.environ['RANK'], 'w').write(','.join(os.environ[n] for n in {names}))"
    assert start(code) == 0
    said = [(tmp_path / str(rank)).read_text().split(",") for rank in range(3)]
    assert [each[:4] for each in said] == [[str(rank), str(rank), "3", "127.0.0.1"] for rank in range(3)]
    assert all(int(each[4]) >= 1 for each in said)


@pytest.mark.parametrize(
    "code, status, told",
    [
        ("report('all the same'); sys.exit(2)", 2, ["error: all the same"]),
        ("rank == '1' and (report('one'), sys.exit(3))", 3, ["error on rank 1: one"]),
        ("rank != '1' and (report('two'), sys.exit(1))", 1, ["error on rank 0, 2: two"]),
        ("rank == '2' and sys.exit(4)", 4, ["error on rank 2: ended with status 4 and said nothing"]),
        ("rank == '0' and os.kill(os.getpid(), 9)", 1, ["error on rank 0: was killed"]),
    ],
)
def test_status_and_what_ranks_report(capfd, code, status, told):
    assert start(REPORT + code) == status
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("megatron-comp:")]
    assert len(errors) == len(told)
    for line, expected in zip(errors, told, strict=True):
        assert expected in line


def test_ranks_that_do_not_end_are_killed_after_the_grace(capfd, monkeypatch):
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.5)
    began = time.monotonic()
    assert start("import os, sys, time; os.environ['RANK'] == '0' and sys.exit(5); time.sleep(100)") == 5
    assert time.monotonic() - began < 20
    assert "error on rank 1, 2: was killed" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda number: number.name)
def test_nobody_outlives_the_command(tmp_path, number):
    rank = (
        "import os, time; from megatron_comp.tools import ranks; assert ranks.joined(); "
        f"open(r'{tmp_path}/' + os.environ['RANK'], 'w').write(str(os.getpid())); time.sleep(100)"
    )
    starter = f"import sys; from megatron_comp.tools import ranks; ranks.start(2, [sys.executable, '-c', {rank!r}])"
    # After SIGKILL nobody is left to remove the starter's folder: let it lie in the test's own.
    process = subprocess.Popen([sys.executable, "-c", starter], env={**os.environ, "TMPDIR": str(tmp_path)})
    try:
        wait_for(lambda: all((tmp_path / str(rank)).exists() and (tmp_path / str(rank)).read_text() for rank in (0, 1)))
        pids = [int((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
        process.send_signal(number)
        process.wait(20)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    finally:
        process.kill()


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_srun_without_ranks_is_an_error(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
    with pytest.raises(ValueError, match=r"WORLD_SIZE=\$SLURM_NTASKS"):
        ranks.joined()
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert ranks.joined()
    assert os.environ["WORLD_SIZE"] == "3"
