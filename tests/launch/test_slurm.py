# SPDX-License-Identifier: Apache-2.0
"""launch/model.sbatch on a cluster of two nodes: what it computes, and that no rank stays behind, however it ends."""

import os
import re
import signal
import sys
from contextlib import ExitStack

import pytest
import slurm
from checkpoints import tiny_mixtral
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


def test_two_nodes_give_the_text_of_one(cluster, smollm2_padded, generate, row_of, row_of_one_node, tmp_path):
    out = tmp_path / "out.json"
    with cluster.job("launch/model.sbatch", *generate(out), MODEL=smollm2_padded) as job:
        wait_for(lambda: len(ranks(job)) == 2, 150, job.output)
        assert {(rank, env["SLURMD_NODENAME"]) for rank, (_, env) in ranks(job).items()} == {("0", "n1"), ("1", "n2")}
        assert job.wait() == ("COMPLETED", "0:0"), job.output()
    assert row_of(out) == row_of_one_node


def test_srun_without_torchrun(cluster, smollm2_padded, generate, row_of, row_of_one_node, tmp_path):
    out = tmp_path / "out.json"
    (port,) = slurm.unused_ports(1)
    command = [sys.executable, "-m", "megatron_comp.cli", *generate(out), "--model", smollm2_padded, "--tp", 2]
    done = cluster.call("srun", "--nodes=2", "--ntasks=2", *command, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert done.returncode == 0, done.stderr
    assert row_of(out) == row_of_one_node


def test_ranks_that_fail(cluster, generate, tmp_path):
    """Their weights are cut short."""
    folder = tiny_mixtral(tmp_path / "model")
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 100)
    with cluster.job("launch/model.sbatch", *generate(tmp_path / "out.json"), MODEL=folder) as job:
        assert_ended(job, "FAILED")
        assert re.search(r"megatron-comp: error on rank [01]: .*model.safetensors", job.output()), job.output()


def test_a_node_that_fails_ends_the_others(cluster, smollm2_padded, generate, tmp_path):
    """Its torchrun ends at once, while the one of the first node waits for it, for a quarter of an hour if need be."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$SLURM_NODEID" = 0 ] || exit 3\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    arguments = generate(tmp_path / "out.json")
    with cluster.job("launch/model.sbatch", *arguments, MODEL=smollm2_padded, PYTHON=python) as job:
        assert_ended(job, "FAILED")


@pytest.mark.parametrize("cancel", [False, True], ids=["torchrun killed", "job cancelled"])
def test_ends_in_the_middle(cluster, smollm2_padded, cancel):
    """While both nodes generate; a torchrun that is killed cannot end its rank itself."""
    arguments = ("generate", "--prompt", "Hello", "--max-new-tokens", 5000)
    with cluster.job("launch/model.sbatch", *arguments, MODEL=smollm2_padded) as job:
        wait_for(lambda: re.search(r"[1-9]\d*/5000", job.output()), 150, job.output)
        if cancel:
            cluster.call("scancel", job.id)
        else:
            pid, _ = ranks(job)["1"]
            os.kill(parent(pid), signal.SIGKILL)
        assert_ended(job, "CANCELLED" if cancel else "FAILED")


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
