import re

import pytest

from megatron_comp.launcher import output

COLUMNS = {"codec": ("codec", "")} | {f"n{i}": (f"heading {i}", ".3f") for i in range(8)}
ROWS = [{"codec": f"codec-{r}"} | {f"n{i}": 1000 * r + i + 0.125 for i in range(8)} for r in range(1, 12)]


@pytest.mark.parametrize("width", [40, 60, 80, 120, 300])
def test_numbers_are_never_cut(capsys, monkeypatch, width):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    output.show("title", COLUMNS, ROWS)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= width
    said = "\n".join(lines)
    for row in ROWS:
        assert row["codec"] in said and all(f"{row[f'n{i}']:.3f}" in said for i in range(8))
    assert "\N{HORIZONTAL ELLIPSIS}" not in said and lines[0].startswith("title")
