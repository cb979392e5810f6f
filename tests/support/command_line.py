# SPDX-License-Identifier: Apache-2.0
"""Runs the command as a user would: another process, its exit status, its output.

Fixtures with models import what they need themselves: the benches' tests also run where there is no Megatron.
"""

import os
import subprocess
import sys

import commands
import pytest
import torch

from megatron_comp import cli

COMMAND = [sys.executable, "-m", "megatron_comp.cli"]

# What a launcher would set; a test that wants it sets it.
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")


def command_environment(**more):
    return {**{key: value for key, value in os.environ.items() if key not in LAUNCHER}, **more}


@pytest.fixture
def command():
    """command(*args, **environment) -> CompletedProcess of `megatron-comp args`, in forked processes (`commands`)."""
    return lambda *args, **environment: commands.run([*COMMAND, *args], command_environment(**environment))


@pytest.fixture
def real_command():
    """Like `command`, in new processes from beginning to end. launcher: what to begin the command line with."""

    def run(*args, launcher=COMMAND):
        argv = [*launcher, *map(str, args)]
        return subprocess.run(argv, capture_output=True, text=True, timeout=240, env=command_environment())

    return run


@pytest.fixture
def start_command():
    """Like `real_command`, without waiting; returns the Popen. Whatever still runs at the end of the test is killed."""
    started = []

    def start(*args):
        argv, pipe = [*COMMAND, *map(str, args)], subprocess.PIPE
        started.append(subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, env=command_environment()))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def bench(monkeypatch):
    """bench(*args) -> status of `megatron-comp bench codec args`, in this process; it starts no ranks."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(cli.ranks, "start", lambda *_: pytest.fail("ranks were started"))
    threads = torch.get_num_threads()
    yield lambda *arguments: cli.main(["bench", "codec", *map(str, arguments)])
    torch.set_num_threads(threads)


@pytest.fixture
def error_line(capsys):
    """error_line() -> the one line that a command in this process failed with."""

    def line():
        errors = capsys.readouterr().err
        (line,) = [line for line in errors.splitlines() if line.startswith("megatron-comp: error")]
        assert "Traceback" not in errors
        return line

    return line


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Folder of a tiny random Llama whose tokens are characters."""
    from characters import character_llama

    return character_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory, sotu_text):
    """A short text for it."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(sotu_text.read_text()[:400])
    return file


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory):
    """Folder of one with two blocks and key-value heads enough to be grouped."""
    from drops import small_llama

    return small_llama(tmp_path_factory.mktemp("two_blocks"))


@pytest.fixture(scope="module")
def drop_text(sotu_text):
    """Options that name its text."""
    from drops import LENGTH

    return ("--text", sotu_text, *LENGTH)
