# SPDX-License-Identifier: Apache-2.0
"""The scripts that start a model: the commands they make, what they refuse, and a run of two nodes without Slurm."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from slurm import ROOT, launch_environment, unused_ports

from megatron_comp import cli

SCRIPTS = ["launch/model.sh", "launch/model.sbatch", "launch/slow_network.sh"]
FORMER_NAMES = [f"{model}.{suffix}" for model in ("llama", "mixtral") for suffix in ("sh", "sbatch")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
GENERATE = ("generate", "--prompt", "two words", "--codec", "mxfp4")


def launch(script, *arguments, path=None, **env):
    env = launch_environment(**env)
    if path:
        env["PATH"] = f"{path}:{env['PATH']}"
    command = ["bash", script, *map(str, arguments)]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)


def dry_run(script, *arguments, **env):
    done = launch(script, *arguments, DRY_RUN=1, **env)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def own(model, tp):
    """The part of the command that is not torchrun's."""
    command, *options = GENERATE
    return ["-m", "megatron_comp.cli", command, "--model", model, "--tp", str(tp), *options]


@pytest.mark.parametrize("script", ["launch/model.sh", "launch/llama.sh", "launch/mixtral.sh"])
def test_command_of_one_node(script):
    command = dry_run(script, *GENERATE, MODEL="some model", NPROC_PER_NODE=4)
    nodes = ["--standalone", "--local-addr", "127.0.0.1"]
    assert command == [*TORCHRUN, "--nnodes", "1", "--nproc-per-node", "4", *nodes, *own("some model", 4)]


def test_command_of_several_nodes():
    place = {"NNODES": 3, "NODE_RANK": 2, "MASTER_ADDR": "10.0.0.1", "TP": 24}
    command = dry_run("launch/model.sh", *GENERATE, MODEL="model", NPROC_PER_NODE=8, **place)
    nodes = ["--node-rank", "2", "--master-addr", "10.0.0.1", "--master-port", "29500"]
    assert command == [*TORCHRUN, "--nnodes", "3", "--nproc-per-node", "8", *nodes, *own("model", 24)]


def test_a_task_of_slurm_knows_its_node():
    place = {"NNODES": 2, "SLURM_NODEID": 1, "SLURM_GPUS_ON_NODE": 8, "MASTER_ADDR": "node1", "MASTER_PORT": 21234}
    command = dry_run("launch/model.sh", *GENERATE, MODEL="model", **place)
    nodes = ["--node-rank", "1", "--master-addr", "node1", "--master-port", "21234"]
    assert command == [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "8", *nodes, *own("model", 16)]


@pytest.fixture
def scontrol(tmp_path):
    """A folder with a scontrol that knows two nodes, whose names need not resolve."""
    script = tmp_path / "scontrol"
    script.write_text(
        '#!/bin/sh\ncase "$*" in "show hostnames n[7-8]") printf "n7\\nn8\\n";;\n'
        '"show node n7") printf "NodeName=n7\\n   NodeAddr=10.1.1.7 NodeHostName=n7\\n";;\n*) exit 1; esac\n'
    )
    script.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("cpus", [{}, {"SLURM_CPUS_PER_TASK": 6}], ids=["", "cpus"])
def test_command_of_a_job(scontrol, cpus):
    job = {"SLURM_JOB_ID": 123456, "SLURM_JOB_NUM_NODES": 2, "SLURM_JOB_NODELIST": "n[7-8]", **cpus}
    command = dry_run("launch/model.sbatch", *GENERATE, path=scontrol, **job)
    expected = ["srun", "--export=ALL", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    expected += ["--cpus-per-task=6"] if cpus else []
    assert command == [*expected, "bash", "launch/model.sh", *GENERATE]


@pytest.mark.parametrize(
    "given, address, port",
    [({}, "10.1.1.7", "23456"), ({"MASTER_ADDR": "10.2.0.7", "MASTER_PORT": "7777"}, "10.2.0.7", "7777")],
)
def test_where_the_ranks_of_a_job_meet(scontrol, given, address, port):
    srun = scontrol / "srun"
    srun.write_text("#!/bin/sh\necho $MASTER_ADDR $MASTER_PORT $NNODES ${NODE_RANK-unset}\n")
    srun.chmod(0o755)
    job = {"SLURM_JOB_ID": 123456, "SLURM_JOB_NUM_NODES": 2, "SLURM_JOB_NODELIST": "n[7-8]", "NODE_RANK": 5}
    done = launch("launch/model.sbatch", *GENERATE, path=scontrol, **job, **given)
    assert done.stdout.split() == [address, port, "2", "unset"], done.stderr


def test_a_signal_for_the_script_reaches_torchrun(tmp_path):
    """The one has become the other."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec echo $$\n")
    python.chmod(0o755)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    env = launch_environment(MODEL=tmp_path, PYTHON=python)
    script = subprocess.Popen(["bash", ROOT / "launch/model.sh", *GENERATE], env=env, stdout=subprocess.PIPE, text=True)
    assert script.communicate(timeout=60)[0] == f"{script.pid}\n"


@pytest.mark.parametrize("cache", [None, "a folder's name"])
def test_quickstart_ends_with_commands_to_copy(tmp_path, cache):
    """As a shell takes them apart, they are what the command line accepts."""
    folder = (tmp_path / cache if cache else ROOT / ".cache").resolve()
    done = launch("launch/quickstart.sh", DRY_RUN=1, MEGATRON_COMP_CACHE=folder)
    assert done.returncode == 0, done.stderr
    activate, *commands = [shlex.split(line) for line in done.stdout.partition("\nNext, in ")[2].splitlines()[1:]]
    assert activate[0] == "source" and activate[1].endswith("/bin/activate")
    assert len(commands) == 3
    for program, *arguments in commands:
        assert program == "megatron-comp"
        args = cli._parser().parse_args(arguments)
        if args.subcommand != "plan":
            assert (ROOT / args.model) == folder / "smollm2"


@pytest.mark.parametrize("words", [["calibrate"], ["bench", "ttft"], ["search"], ["evaluate"]], ids=" ".join)
def test_commands_that_run_on_all_machines(words):
    done = launch("launch/model.sh", *words, "--codec", "mxfp4", MODEL="model", NPROC_PER_NODE=2, DRY_RUN=1, SETUP=0)
    assert done.returncode == 0, done.stderr
    model = [] if words == ["calibrate"] else ["--model", "model"]
    expected = ["-m", "megatron_comp.cli", *words, *model, "--tp", "2", "--codec", "mxfp4"]
    assert shlex.split(done.stdout)[-len(expected) :] == expected


SEVERAL = {"MODEL": "model", "NNODES": 2, "DRY_RUN": 1}


@pytest.mark.parametrize(
    "arguments, env, message",
    [
        ([], {"MODEL": "model"}, "the first argument is '': it has to be generate, evaluate, search"),
        (["train"], {"MODEL": "model"}, "the first argument is 'train'"),
        (["generate"], {}, "set MODEL to the folder of a checkpoint"),
        (["generate"], {"MODEL": "nowhere"}, "MODEL=nowhere: no such folder on .*, or no config.json in it"),
        (["generate"], {"MODEL": "model", "DRY_RUN": 1, "NPROC_PER_NODE": "two"}, "NPROC_PER_NODE=two: a whole number"),
        (["generate"], {"MODEL": "model", "DRY_RUN": 1, "NNODES": 0}, "NNODES=0: a whole number from 1"),
        (
            ["generate"],
            {"MODEL": "model", "DRY_RUN": 1, "NPROC_PER_NODE": 2, "TP": 3},
            "TP=3, but NPROC_PER_NODE=2 x NNODES=1 are 2 ranks",
        ),
        (["generate"], SEVERAL, "NODE_RANK='': with NNODES=2 it is 0 to 1"),
        (["generate"], {**SEVERAL, "NODE_RANK": 2}, "NODE_RANK='2': with NNODES=2 it is 0 to 1"),
        (["generate"], {**SEVERAL, "NODE_RANK": 1}, "set MASTER_ADDR"),
        (["generate"], {"MODEL": "model", "DRY_RUN": 1, "SETUP": 1, "MEGATRON_COMP_VENV": "/nowhere"}, "SETUP=0"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, env, message):
    refused(launch("launch/model.sh", *arguments, **env), message)


@pytest.mark.parametrize("name", FORMER_NAMES)
def test_former_names_are_links(name):
    assert (ROOT / "launch" / name).readlink() == Path(f"model.{name.partition('.')[2]}")


def test_sbatch_files_outside_of_a_job(tmp_path):
    refused(
        launch("launch/model.sbatch", *GENERATE), "not in a Slurm job: sbatch submits this file, bash launch/model.sh"
    )
    command = ["bash", ROOT / "launch/model.sbatch", *GENERATE]
    elsewhere = subprocess.run(command, env=launch_environment(), cwd=tmp_path, capture_output=True, text=True)
    refused(elsewhere, "submit this from the repository's root")


def refused(done, message):
    assert done.returncode == 2 and not done.stdout
    assert re.search(message, done.stderr) and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse_and_say_how_they_are_used(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    header, _, body = (ROOT / script).read_text().partition("\nset -euo pipefail\n")
    assert body and all(line.startswith("#") for line in header.splitlines())
    for word in ("# Usage:", "# Required:", "# Optional:"):
        assert word in header


def test_two_ranks_on_one_node(model, generate, row_of, row_of_command, tmp_path):
    out = tmp_path / "out.json"
    command = ["bash", ROOT / "launch/model.sh", *generate(out)]
    env = launch_environment(MODEL=model, NPROC_PER_NODE=2)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert row_of(out) == row_of_command


def test_two_nodes_without_slurm(model, generate, row_of, row_of_command, tmp_path):
    """Both are this machine, with a rank each."""
    out = tmp_path / "out.json"
    (port,) = unused_ports(1)
    place = {"NNODES": 2, "NPROC_PER_NODE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "MODEL": model}
    nodes = [
        subprocess.Popen(
            ["bash", ROOT / "launch/model.sh", *generate(out)],
            env=launch_environment(**place, NODE_RANK=rank),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for node in nodes:
            _, errors = node.communicate(timeout=150)
            assert node.returncode == 0, errors
    finally:
        for node in nodes:
            node.terminate()  # torchrun ends its rank
            node.wait(60)
    assert row_of(out) == row_of_command
