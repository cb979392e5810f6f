# SPDX-License-Identifier: Apache-2.0
"""The command line itself: what it says of its subcommands, within the time that Python takes to start."""

import subprocess
import sys

import pytest

from megatron_comp import cli
from megatron_comp.commands.arguments import bench, drop

SLOW = ("torch", "numpy", "rich", "tqdm", "transformers", "megatron", "yaml")


GROUPS = {"bench": bench, "drop": drop}
LEAVES = [[name] for name in cli.SUBCOMMANDS.modules if name not in GROUPS]
LEAVES += [[group, name] for group, module in GROUPS.items() for name in module.SUBCOMMANDS.modules]
EVERY = [[], *([group] for group in GROUPS), *LEAVES]


def test_version_and_every_help_import_nothing_slow():
    """In one process, each in turn."""
    asked = [["--version"], *([*words, "--help"] for words in EVERY)]
    code = f"""
import sys
from megatron_comp import cli
for words in {asked!r}:
    try:
        cli.main(words)
    except SystemExit as ended:
        print(*words, "status:", ended.code, "imported:", *sorted(set({SLOW!r}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "imported:" in line]
    assert said == [f"{' '.join(words)} status: 0 imported:" for words in asked]


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_help_of_every_subcommand(words, capsys):
    """Begins with a sentence, and names options."""
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--help"])
    said = capsys.readouterr().out
    description = said.split("\n\n")[1]
    assert ended.value.code == 0 and description[0].isupper() and "--help" in said


def test_help_without_docstrings():
    """As under `python -OO`, which leaves them out."""
    command = [sys.executable, "-OO", "-m", "megatron_comp.cli", "plan", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--link" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "argv, said",
    [
        (["generate", "--model", "x", "--tp", "0", "--prompt", "x", "--max-new-tokens=1"], "--tp 0: at least one rank"),
        (["calibrate", "--ranks", "1"], "--tp 1: a link needs at least two"),
        (["calibrate", "--tp", "2", "--rounds", "0"], "--runs 0: at least one"),
        (["bench", "codec", "--repeats=0"], "--runs 0: at least one"),
        (["bench", "collective", "--ranks", "1"], "--tp 1: allowed are 2 and more"),
        (
            ["plan", "--model", "x", "--tp", "2", "--dtype", "bfloat16", "--tokens", "0"],
            "--prompt-tokens 0: at least one",
        ),
    ],
)
def test_earlier_spellings_are_understood(argv, said, capsys, monkeypatch):
    """And an error names the option by the word that it has now."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert cli.main(argv) == 2
    assert said in capsys.readouterr().err


def test_one_word_per_concept(capsys):
    """No help shows an earlier spelling, and every one ends with an example."""
    for words in LEAVES:
        with pytest.raises(SystemExit):
            cli.main([*words, "--help"])
        said = capsys.readouterr().out
        for former in ("--ranks", "--repeats", "--rounds", "--max-new-tokens", "--distilled", "float32"):
            assert former not in said, (words, former)
        assert f"megatron-comp {' '.join(words)} " in said.partition("Example:")[2], words
