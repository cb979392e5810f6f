# SPDX-License-Identifier: Apache-2.0
"""Tables in terminals of every width: no number is ever cut."""

import io

import pytest
from rich.console import Console

from megatron_comp.launcher import output

COLUMNS = {"name": ("policy", ""), **{f"f{n}": (f"time to token {n}, ms", ".3f") for n in range(6)}}
ROWS = [{"name": f"int{n}:32:fp16", **{f"f{k}": 123456.789 + n + k for k in range(6)}} for n in range(3)]


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120, 200])
def test_every_field_is_whole(monkeypatch, width):
    file = io.StringIO()
    monkeypatch.setattr(
        output, "_console", lambda: Console(file=file, width=width, force_terminal=True, color_system=None)
    )
    output.show("rows", COLUMNS, ROWS)
    lines = file.getvalue().splitlines()
    words = file.getvalue().split()
    assert max(map(len, lines)) <= max(width, 43) and "…" not in file.getvalue()
    for row in ROWS:
        assert row["name"] in words and all(f"{row[f'f{k}']:.3f}" in words for k in range(6))
