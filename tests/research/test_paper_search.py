# SPDX-License-Identifier: Apache-2.0
"""The paper's search on a tiny random Llama over two ranks, and its simulated baselines by hand."""

import contextlib
import csv
import io
import os

import pytest
import torch
import yaml
from ranks import run_ranks
from searches import LENGTH

from research import paper_search as paper


def rank_of_search(rank, world_size, folder, arguments):
    os.chdir(folder)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = paper.main(arguments)
    return status, said.getvalue()


def test_search(llama, text, tmp_path):
    files = ("--out", "policy.yaml", "--csv", "rows.csv")
    words = ["--model", llama, "--tp", 2, "--text", text, *LENGTH, *files, "--max-kl", 0.5]
    (status, said), (other, _) = run_ranks(rank_of_search, 2, str(tmp_path), list(map(str, words)), init=False)
    assert status == other == 0, said
    with open(tmp_path / "rows.csv") as file:
        rows = list(csv.DictReader(file))
    (chosen,) = (row for row in rows if row["chosen"])
    within = [row for row in rows if row["kind"] == "format" and float(row["kl"]) <= 0.5]
    assert float(chosen["bits_per_value"]) == min(float(row["bits_per_value"]) for row in within)
    content = (tmp_path / "policy.yaml").read_text()
    assert yaml.safe_load(content)["codec"] == chosen["name"]
    assert content.startswith("# Found by python -m research.paper_search, KL <= 0.5\n")
    int4, topk = (row for row in rows if row["kind"] == "baseline")
    assert (int4["name"], float(int4["bits_per_value"])) == ("int4 channel-wise", 4.25)
    assert (topk["name"], float(topk["kl"]) > float(chosen["kl"])) == ("topk 3x", True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tp", "1"], "--tp 1: one rank sums nothing"),
        (["--tp", "2", "--max-kl", "0"], "--max-kl 0.0: allowed are numbers above 0"),
    ],
)
def test_seen_before_any_rank_starts(capsys, monkeypatch, llama, text, arguments, message):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert paper.main(["--model", str(llama), "--text", str(text), *LENGTH, "--out", "policy.yaml", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_simulated_baselines():
    x = torch.randn(6, 2, 96, generator=torch.Generator().manual_seed(0))
    x[..., 5] = 0
    kept = paper.topk(x)
    assert torch.equal((kept != 0).sum(-1), torch.full((6, 2), 16))  # of 96, 16 + 16 bits each: a third of 16 bits
    assert torch.equal(kept[kept != 0], x[kept != 0])
    assert (kept.abs().masked_fill(kept == 0, 9).amin(-1) >= x.masked_fill(kept != 0, 0).abs().amax(-1)).all()

    rounded = paper.int4_by_channel(x)
    step = x.abs().amax((0, 1)) / 7
    assert ((rounded - x).abs() <= step * 0.503).all()  # half a step, and the scale's own rounding to fp16
    assert max(len(rounded[..., channel].unique()) for channel in range(96)) <= 15
