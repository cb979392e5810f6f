# SPDX-License-Identifier: Apache-2.0
"""`ranks.start` with commands of a few lines: what comes back, and that nobody stays behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest

from megatron_comp import cli
from megatron_comp.launcher import ranks

REPORT = "from megatron_comp.launcher.ranks import report; import os, sys; rank = os.environ['RANK']; "


# Rank 1 ends, and the others go on a while later.
LOST = """
import time
from pathlib import Path
ending = Path(os.environ["MEGATRON_COMP_ERRORS"], "ending")
def when_1_ends(end):
    if rank == "1":
        ending.touch()
        end()
    while not ending.exists():
        time.sleep(0.05)
    time.sleep(0.5)
"""


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
        (
            "rank == '2' and os.kill(os.getpid(), 11)",
            1,
            ["error on rank 2: was ended by signal 11 (Segmentation fault)"],
        ),
        # What the others say of the one that they lost, each with its own address, is a line.
        (
            LOST + "when_1_ends(lambda: (report('one'), sys.exit(2)))\nreport('lost 1, ' + rank)\nsys.exit(2)",
            2,
            ["error on rank 1: one", "then an error on rank 0, 2: lost 1, "],
        ),
        (
            LOST + "when_1_ends(lambda: os.kill(os.getpid(), 9))\nreport('lost 1, ' + rank)\nsys.exit(1)",
            1,
            ["error on rank 1: was killed", "then an error on rank 0, 2: lost 1, "],
        ),
    ],
)
def test_status_and_what_ranks_report(code, status, told):
    done = commands.run(commands.on_ranks(3, [sys.executable, "-c", REPORT + code]), dict(os.environ))
    assert done.returncode == status
    errors = [line for line in done.stderr.splitlines() if line.startswith("megatron-comp:")]
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
        "import os, time; from megatron_comp.launcher import ranks; assert ranks.joined(); "
        f"open(r'{tmp_path}/' + os.environ['RANK'], 'w').write(str(os.getpid())); time.sleep(100)"
    )
    starter = f"import sys; from megatron_comp.launcher import ranks; ranks.start(2, [sys.executable, '-c', {rank!r}])"
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


def test_ranks_end_with_a_torchrun_that_is_killed(tmp_path):
    """It cannot end them itself then, and they would wait for each other."""
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import os, time; from megatron_comp.launcher import ranks; assert ranks.joined(); "
        f"open(r'{tmp_path}/' + os.environ['RANK'], 'w').write(str(os.getpid())); time.sleep(100)"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", rank]
    process = subprocess.Popen(torchrun, env={**os.environ, "TMPDIR": str(tmp_path)})
    try:
        wait_for(lambda: all((tmp_path / str(rank)).exists() and (tmp_path / str(rank)).read_text() for rank in (0, 1)))
        pids = [int((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
        time.sleep(0.5)
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
        process.kill()
        process.wait(20)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    finally:
        process.kill()


@pytest.fixture
def srun_task(monkeypatch):
    """The environment of the second of three tasks, the first on its node."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # to be restored after the test
        monkeypatch.delenv(name)
    for name, value in {"STEP_NUM_TASKS": "3", "NTASKS": "3", "PROCID": "1", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return monkeypatch.setenv


def test_srun_tasks_are_ranks(srun_task):
    srun_task("MASTER_ADDR", "127.0.0.1")
    srun_task("MASTER_PORT", "29500")
    assert ranks.joined()
    assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["1", "0", "3"]


def test_a_launcher_inside_an_srun_task_has_the_word(srun_task):
    for name, value in {"RANK": "5", "LOCAL_RANK": "2", "WORLD_SIZE": "6"}.items():
        srun_task(name, value)
    assert ranks.joined()
    assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["5", "2", "6"]


def test_srun_without_a_place_to_meet_is_an_error(srun_task, capsys):
    srun_task("MASTER_ADDR", "127.0.0.1")
    assert cli.main(["generate", "--model", "nowhere", "--tp", "3", "--prompt", "Hello"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "megatron-comp: error: srun started 3 tasks that do not know where to meet: set MASTER_ADDR"
    )
    assert error.count("\n") == 1


def test_one_srun_task_starts_its_own_ranks(srun_task):
    srun_task("SLURM_STEP_NUM_TASKS", "1")
    assert not ranks.joined()


LISTENING = """
import os, torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
print(os.environ["MASTER_PORT"] if dist.get_rank() == 0 else "", flush=True)
dist.barrier()
"""


def listening_addresses(port):
    """What sockets of this machine listen on the port, as hexadecimal addresses of /proc."""
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return [words[1].split(":")[0] for words in lines if int(words[1].split(":")[1], 16) == port and words[3] == "0A"]


def test_no_machine_is_asked_for_too_many_ranks():
    with pytest.raises(ValueError, match="99999999 ranks: at most 1024 are started on one machine"):
        ranks.start(99999999, ["true"])


def test_the_store_listens_on_this_machine_alone():
    """An object that ranks hand to one another is pickled: who reaches the store runs what they like."""
    with ranks._meeting(None) as (place, _):
        port = int(place["MASTER_PORT"])
        assert listening_addresses(port) == ["0100007F"]  # 127.0.0.1
        with socket.socket() as elsewhere:
            elsewhere.bind(("127.0.0.2", port))  # would be taken if the store listened on all addresses


def test_ranks_meet_at_the_store(tmp_path):
    done = commands.run(commands.on_ranks(2, [sys.executable, "-c", LISTENING]), dict(os.environ))
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr
