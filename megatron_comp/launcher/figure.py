# SPDX-License-Identifier: Apache-2.0
"""Figures written to files, in one way."""

from pathlib import Path

from ..files import replacing


def save(figure, path: str | Path) -> None:
    """Writes a matplotlib figure as .png or .svg, whole or not at all.

    In an SVG, text is text: it can be searched, read aloud and translated. Equal figures give equal files.

    Raises OSError if the file cannot be written.
    """
    import matplotlib

    metadata = {"Date": None} if Path(path).suffix == ".svg" else {}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "megatron_comp"}), replacing(path) as partial:
        figure.savefig(partial, dpi=150, metadata=metadata)


def label_plainly(axis) -> None:
    """Labels a logarithmic axis by numbers, not by powers of ten; between these by twos, threes and fives."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")
