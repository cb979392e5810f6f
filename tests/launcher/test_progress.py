# SPDX-License-Identifier: Apache-2.0
"""What a long command says of how far it is: lines in a log, a bar in a terminal."""

import itertools
import sys

from megatron_comp.launcher import progress


def shown(monkeypatch, capsys, rank="0", terminal=False):
    """Of 600 steps of a second each."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    clock = itertools.count()
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    for _ in progress.progress(range(600), desc="work", unit="step", mininterval=0):
        pass
    return capsys.readouterr().err


def test_a_log_gets_lines_ever_further_apart(monkeypatch, capsys):
    said = shown(monkeypatch, capsys)
    assert "\r" not in said
    steps = [int(line.removeprefix("work: ").partition("/600")[0]) for line in said.splitlines()]
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    assert gaps[:4] == [4, 8, 16, 32] and len(steps) > 10 and all(59 <= gap <= 61 for gap in gaps[4:])


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    assert shown(monkeypatch, capsys, terminal=True).count("\r") > 100


def test_one_rank_speaks(monkeypatch, capsys):
    assert not shown(monkeypatch, capsys, rank="1", terminal=True) and not shown(monkeypatch, capsys, rank="1")
