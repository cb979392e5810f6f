# SPDX-License-Identifier: Apache-2.0
"""How a page writes numbers, and draws figures."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from ..launcher.output import with_interval
from .document import Figure

STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # names come from files: a dollar is a dollar
}


def said(row: dict, key: str, spec: str, unit: str = "") -> str:
    return "not finite" if row[key] is None else format(row[key], spec) + unit


def spread(row: dict, key: str, spec: str) -> str:
    """A number, and on a line below it its interval."""
    return (with_interval(row, key, spec) or "not finite").replace(" (", "\n(")


def percent(row: dict, key: str, spec: str) -> str:
    """A share and its interval, in percent; of a change, in points."""
    names = (key, f"{key}_low", f"{key}_high")
    return spread({name: None if row[name] is None else 100 * row[name] for name in names}, key, spec)


def megabytes(row: dict) -> str:
    return f"{row['bytes_per_rank'] / 1e6:,.1f}"


def drawn(name: str, says: str, draw: Callable[[str], None]) -> Figure:
    """draw: writes an SVG to a path, in this page's style."""
    import matplotlib

    with tempfile.TemporaryDirectory(prefix="megatron-comp-") as folder, matplotlib.rc_context(STYLE):
        path = Path(folder, "figure.svg")
        draw(str(path))
        return Figure(name, path.read_text(encoding="utf-8"), says)
