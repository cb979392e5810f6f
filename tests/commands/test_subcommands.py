"""The command's own options, which need nothing that takes long to import."""

import subprocess
import sys

import pytest

from megatron_comp import cli

SLOW = ("torch", "numpy", "rich", "tqdm", "transformers", "megatron", "yaml")


@pytest.mark.parametrize(
    "option, said", [("--version", "megatron_comp "), ("--help", "generate"), ("bench --help", "ttft")]
)
def test_version_and_help_import_nothing_slow(option, said):
    code = f"""
import sys
from megatron_comp import cli
try:
    cli.main({option.split()!r})
finally:
    print("imported:", *sorted(set({SLOW!r}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout and done.stdout.endswith("imported:\n")


@pytest.mark.parametrize("name", cli.SUBCOMMANDS.modules)
def test_help_of_every_subcommand(name, capsys):
    """Begins with a sentence, and names options."""
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    said = capsys.readouterr().out
    description = said.split("\n\n")[1]
    assert ended.value.code == 0 and description[0].isupper() and "--help" in said


def test_help_without_docstrings():
    """As under `python -OO`, which leaves them out."""
    command = [sys.executable, "-OO", "-m", "megatron_comp.cli", "plan", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--link" in done.stdout, done.stderr
