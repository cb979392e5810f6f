# SPDX-License-Identifier: Apache-2.0
"""Figures of benches say what a reader needs without the page."""

import pytest

from megatron_comp.bench import plot

pytest.importorskip("matplotlib")
ABOUT = {"device": "a processor", "torch": "2", "triton": "3", "megatron_comp": "1", "date": "2026-01-01"}


def row(policy, algorithm, milliseconds):
    times = {"ttft_ms": milliseconds, "p20_ms": 0.9 * milliseconds, "p80_ms": 1.1 * milliseconds, "speedup": 1.0}
    return {"policy": policy, "algorithm": algorithm, **times, **ABOUT}


@pytest.mark.parametrize("algorithm, marked", [("all_reduce", True), ("two_step", False)])
def test_a_policy_that_compressed_nothing_is_marked(tmp_path, algorithm, marked):
    rows = [row("none", "all_reduce", 20), row("mixed.yaml", algorithm, 10)]
    names = {"panel": lambda row: "all", "bar": lambda row: row["policy"], "time": "ttft_ms", "speedup": "speedup"}
    plot.draw_times(rows, tmp_path / "times.svg", "Time to first token", **names)
    text = (tmp_path / "times.svg").read_text()
    assert "Time to first token" in text and "mixed.yaml" in text
    assert ("a policy that compressed no sum" in text) == marked
