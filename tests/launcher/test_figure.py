# SPDX-License-Identifier: Apache-2.0
"""Figures: text stays text, equal figures give equal files, and a figure that fails leaves the old file."""

import xml.etree.ElementTree as ElementTree

import pytest

from megatron_comp.launcher.figure import save

TEXT = "{http://www.w3.org/2000/svg}text"


@pytest.fixture
def figure():
    matplotlib_figure = pytest.importorskip("matplotlib.figure")
    figure = matplotlib_figure.Figure()
    figure.add_subplot(title="time to first token").plot([1, 2], [3, 4])
    return figure


def test_text_in_an_svg_is_text(figure, tmp_path):
    save(figure, tmp_path / "one.svg")
    texts = [element.text for element in ElementTree.parse(tmp_path / "one.svg").iter(TEXT)]
    assert "time to first token" in texts
    save(figure, tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_a_figure_that_fails_leaves_the_old_file(figure, tmp_path):
    file = tmp_path / "figure.png"
    save(figure, file)
    before = file.read_bytes()
    figure.axes[0].set_title("$\\unknown$")
    with pytest.raises(ValueError):
        save(figure, file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
