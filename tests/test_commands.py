# SPDX-License-Identifier: Apache-2.0
"""Command lines in forked processes: what they see and leave is what a process of its own would."""

import os
import subprocess
import sys
from pathlib import Path

import commands
import pytest
from network import wait_for

SAY = "import os, sys; print(sys.argv[1:], os.environ.get('SAID'), os.getcwd()); print('oops', file=sys.stderr); "


def both(argv, environment, cwd):
    """What a forked process gives, after a check that a real one gives the same."""
    forked = commands.run(argv, environment, cwd)
    real = subprocess.run(list(map(str, argv)), env=environment, cwd=cwd, capture_output=True, text=True)
    assert (forked.returncode, forked.stdout) == (real.returncode, real.stdout)
    # Lines of a traceback name the file that ran the code.
    assert forked.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]
    return forked


@pytest.fixture
def environment():
    return {**os.environ, "SAID": "this"}


@pytest.mark.parametrize("how", ["code", "file", "module"])
@pytest.mark.parametrize(
    "end, status",
    [("", 0), ("sys.exit(7)", 7), ("sys.exit('why')", 1), ("1 / 0", 1), ("os.kill(os.getpid(), 9)", -9)],
)
def test_it_is_as_in_a_process_of_its_own(environment, tmp_path, how, end, status):
    (tmp_path / "a_module_of_its_own.py").write_text(SAY + end)
    words = {"code": ["-c", SAY + end], "file": ["a_module_of_its_own.py"], "module": ["-m", "a_module_of_its_own"]}
    assert both([sys.executable, *words[how], "an argument"], environment, tmp_path).returncode == status


def test_the_environment_is_the_given_one_alone(environment, tmp_path):
    """Also what is imported from PYTHONPATH, and what runs at the end."""
    (tmp_path / "somewhere").mkdir()
    ends = "import atexit, threading, time; atexit.register(print, 'the end')\n"
    ends += "threading.Thread(target=lambda: (time.sleep(0.2), print('a thread'))).start()"
    (tmp_path / "somewhere" / "a_module_of_its_own.py").write_text(ends)
    del environment["SAID"]
    environment["PYTHONPATH"] = str(tmp_path / "somewhere")
    done = both([sys.executable, "-c", SAY + "import a_module_of_its_own"], environment, tmp_path)
    assert done.stdout.splitlines() == [f"[] None {tmp_path}", "a thread", "the end"]


def test_ranks_are_forked_with_their_environment(environment, tmp_path):
    code = "import os, sys; print(os.environ['RANK'], os.environ['SAID'], 'torch' in sys.modules, os.getppid())"
    done = commands.run(commands.on_ranks(2, [sys.executable, "-c", code]), environment, tmp_path)
    assert done.returncode == 0, done.stderr
    ranks = sorted(line.split() for line in done.stdout.splitlines())
    assert [rank[:3] for rank in ranks] == [["0", "this", "True"], ["1", "this", "True"]]
    assert ranks[0][3] == ranks[1][3]


def test_a_rank_that_fails_is_told_of(environment):
    """By what it reported in a temporary folder of the process that started it."""
    code = "import os, sys; from megatron_comp.launcher.ranks import report; "
    code += "os.environ['RANK'] == '1' and (report('so it is'), sys.exit(3))"
    done = commands.run(commands.on_ranks(2, [sys.executable, "-c", code]), environment)
    assert done.returncode == 3
    assert "error on rank 1: so it is" in done.stderr


def test_nobody_outlives_a_command_that_takes_too_long(environment, tmp_path):
    code = f"import os, time; open(r'{tmp_path}/' + os.environ['RANK'], 'w').write(str(os.getpid())); time.sleep(600)"
    with pytest.raises(subprocess.TimeoutExpired):
        commands.run(commands.on_ranks(2, [sys.executable, "-c", code]), environment, timeout=4)
    for rank in "01":
        state = Path("/proc", (tmp_path / rank).read_text(), "stat")
        # Nobody is obliged to collect what is left of a process that has lost its parent.
        wait_for(lambda state=state: not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z")
