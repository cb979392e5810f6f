# SPDX-License-Identifier: Apache-2.0
"""launch/model.sbatch on a cluster of two nodes: what it computes, and that no rank stays behind, however it ends."""

import os
import re
import signal
import sys
from contextlib import ExitStack

import pytest
import slurm
from slurm import wait_for

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster():
    if missing := slurm.missing():
        pytest.skip(f"there is no Slurm here to start: {', '.join(missing)} missing")
    with ExitStack() as stack:
        try:
            cluster = stack.enter_context(slurm.cluster())
        except AssertionError as error:  # ends with what the daemons said
            pytest.skip(f"Slurm does not start here: {str(error).splitlines()[-1]}")
        yield cluster


def test_two_nodes_give_the_text_of_the_command(cluster, model, generate, row_of, row_of_command, tmp_path):
    out = tmp_path / "out.json"
    with cluster.job("launch/model.sbatch", *generate(out), MODEL=model) as job:
        wait_for(lambda: len(ranks(job)) == 2, 150, job.output)
        assert {(rank, env["SLURMD_NODENAME"]) for rank, (_, env) in ranks(job).items()} == {("0", "n1"), ("1", "n2")}
        assert job.wait() == ("COMPLETED", "0:0"), job.output()
    assert row_of(out) == row_of_command


def test_srun_without_torchrun(cluster, model, generate, row_of, row_of_command, tmp_path):
    out = tmp_path / "out.json"
    (port,) = slurm.unused_ports(1)
    command = [sys.executable, "-m", "megatron_comp.cli", *generate(out), "--model", model, "--tp", 2]
    done = cluster.call("srun", "--nodes=2", "--ntasks=2", *command, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert done.returncode == 0, done.stderr
    assert row_of(out) == row_of_command


def test_ranks_that_fail(cluster, generate, model, tmp_path):
    """They notice it before they import anything large."""
    arguments = (*generate(tmp_path / "out.json"), "--new-tokens", 40000)
    with cluster.job("launch/model.sbatch", *arguments, MODEL=model) as job:
        assert_ended(job, "FAILED")
        assert re.search(r"megatron-comp: error on rank [01]: --new-tokens 40000: ", job.output()), job.output()


def test_a_node_that_fails_ends_the_others(cluster, model, generate, tmp_path):
    """Its torchrun ends at once, while the one of the first node waits for it, for a quarter of an hour if need be."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$SLURM_NODEID" = 0 ] || exit 3\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    arguments = generate(tmp_path / "out.json")
    with cluster.job("launch/model.sbatch", *arguments, MODEL=model, PYTHON=python) as job:
        assert_ended(job, "FAILED")


def test_a_torchrun_that_is_killed(cluster, model):
    """While both nodes generate; it cannot end its rank itself."""
    arguments = ("generate", "--prompt", "Hello", "--max-new-tokens", 20000)
    with cluster.job("launch/model.sbatch", *arguments, MODEL=model) as job:
        wait_for(lambda: re.search(r"[1-9]\d*/20000", job.output()), 150, job.output)
        pid, _ = ranks(job)["1"]
        os.kill(parent(pid), signal.SIGKILL)
        assert_ended(job, "FAILED")


def test_a_job_that_is_cancelled(cluster, model, generate, tmp_path):
    """Its ranks do nothing but wait, and know of no job."""
    (tmp_path / "waiting.py").write_text("import time; print('a rank waits', flush=True); time.sleep(300)")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\nexec {sys.executable} "${{@/megatron_comp.cli/waiting}}"\n')
    python.chmod(0o755)
    place = {"MODEL": model, "PYTHON": python, "PYTHONPATH": tmp_path}
    with cluster.job("launch/model.sbatch", *generate(tmp_path / "out.json"), **place) as job:
        wait_for(lambda: job.output().count("a rank waits") == 2, 150, job.output)
        cluster.call("scancel", job.id)
        assert_ended(job, "CANCELLED")


def assert_ended(job, expected):
    """In that state, with a status that is not zero, and without a process that goes on."""
    state, status = job.wait()
    assert state == expected and status != "0:0", job.output()
    wait_for(lambda: not job.processes(), 10, lambda: str(job.processes()))


def ranks(job):
    """(pid, environment) of each rank that runs."""
    return {env["RANK"]: (pid, env) for pid, env in job.processes().items() if "RANK" in env}


def parent(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return int(stat.read().rsplit(")", 1)[1].split()[1])
