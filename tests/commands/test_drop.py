# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp drop` on ranks: sensitivities and curves, their state, and what is refused in one line."""

import json
import math

import pytest
from drops import LAYERS, RANKS, command, distilled
from predictors import tensors, write

import megatron_comp as mc
from megatron_comp import cli
from megatron_comp.commands import drop_sensitivity
from megatron_comp.files import digest
from megatron_comp.inference.hf import read_config
from megatron_comp.spd import blocks


@pytest.fixture(scope="module")
def weights(two_blocks, drop_text, tmp_path_factory):
    """File of distilled weights of both blocks."""
    folder = tmp_path_factory.mktemp("distilled")
    assert distilled(two_blocks, drop_text, folder, "0-1", "both.safetensors") == 0
    return folder / "both.safetensors"


def test_sensitivity_and_curve(two_blocks, drop_text, weights, tmp_path):
    """The whole way on real ranks; interrupted after the first of its files was half done."""
    files = {name: tmp_path / name for name in ("s.json", "s.state", "s.png", "c.json", "c.state", "c.csv", "c.png")}
    measured = ("--state", files["s.state"], "--figure", files["s.png"], "--json", files["s.json"])
    common = ("--model", two_blocks, "--tp", RANKS, *drop_text)
    command(RANKS, "sensitivity", *common, *measured, "--thresholds", "0", "1e9")
    rows = json.loads(files["s.json"].read_text())["rows"]
    state = json.loads(files["s.state"].read_text())
    points = state["points"]
    assert len(points) == 1 + 2 * LAYERS - 1  # the full model; the last block alone is all from the last on
    full, last, both = (
        math.exp(points[str(mc.CompressionPolicy(layers=blocks.layers_that_drop(dropped)))]["nll"])
        for dropped in ([], [1], [0, 1])
    )
    assert [row["perplexity_delta"] for row in rows] == pytest.approx([both - last, last - full])
    assert all(row["kl"] > 0 and row["class"] == "sensitive" for row in rows)
    assert sorted(row["rank"] for row in rows) == [0, 1] and files["s.png"].stat().st_size > 0

    del points[str(mc.CompressionPolicy(layers={"0": {"attention": "drop"}}))]
    points[str(mc.CompressionPolicy())]["nll"] = math.log(7.0)  # what is in the file is not measured again
    files["s.state"].write_text(json.dumps(state))
    command(RANKS, "sensitivity", *common, *measured)
    again = json.loads(files["s.json"].read_text())["rows"]
    assert again[0] == rows[0] | {"class": again[0]["class"]}
    assert again[1]["perplexity_delta"] == pytest.approx(last - 7.0)

    command(
        *(RANKS, "curve", *common, "--sensitivity", files["s.json"], "--in-order"),
        *("--distilled", weights, "--percent", "0", "50", "100", "--codec", "none"),
        *("--codec", "int8:32:fp16", "--state", files["c.state"], "--json", files["c.json"]),
        *("--csv", files["c.csv"], "--figure", files["c.png"]),
    )
    found = json.loads(files["c.json"].read_text())["rows"]
    assert len(found) == 3 * 2 * 3 and files["c.png"].stat().st_size > 0
    curve = {(row["order"], row["codec"], row["percent"]): row for row in found}
    base = curve["in order", "none", 0]
    assert base["perplexity"] == pytest.approx(full) and base["kl"] == 0 and base["perplexity_increase_pct"] == 0
    for order in ("in order", "sensitivity"):
        assert curve[order, "none", 100]["perplexity"] == pytest.approx(both)
        assert curve[order, "none", 100]["received_bytes"] == base["received_bytes"] / 2
        coded = curve[order, "int8:32:fp16", 100]["received_bytes"]
        assert coded == pytest.approx(base["received_bytes"] / 2 * 8.5 / 32)
    assert curve["sensitivity", "none", 50]["dropped"] == 1
    healed = curve["sensitivity, distilled", "none", 100]
    assert healed["replaced"] == 2 and healed["kl"] < curve["sensitivity", "none", 100]["kl"]
    assert curve["sensitivity, distilled", "none", 0]["kl"] == 0


def test_a_curve_with_a_predictor(two_blocks, drop_text, tmp_path):
    """Of layers that see the other ranks' predicted parts; where nothing is dropped, nothing is predicted."""
    hidden = read_config(two_blocks).hidden_size
    predictor = write(tmp_path / "p.safetensors", tensors(LAYERS, hidden, RANKS, sites=["attention"]), RANKS)
    rows = []
    for more in ((), ("--predictor", predictor)):
        common = ("--model", two_blocks, "--tp", RANKS, *drop_text, *more, "--state", tmp_path / f"state{len(more)}")
        command(RANKS, "curve", *common, "--percent", 0, 100, "--json", tmp_path / "curve.json")
        rows.append(json.loads((tmp_path / "curve.json").read_text())["rows"])
    (full, dropped), (predicted_full, predicted) = rows
    assert full["kl"] == predicted_full["kl"] == 0 and 0 < dropped["kl"] != predicted["kl"] > 0
    assert json.loads((tmp_path / "state2").read_text())["settings"]["predicted by"] == digest(predictor)


def test_ranks_and_classes():
    points = [{"block": n, "perplexity": p, "kl": k} for n, (p, k) in enumerate([(16, 0.2), (12, 0.01), (11, 0.03)])]
    rows = drop_sensitivity.rank(points, 10.0, "perplexity_delta", (1.0, 3.0))
    assert [row["perplexity_delta"] for row in rows] == [4, 1, 1]
    assert [row["class"] for row in rows] == ["extreme", "insensitive", "insensitive"]
    assert [row["rank"] for row in rows] == [2, 0, 0]
    assert [row["rank"] for row in drop_sensitivity.rank(points, 10.0, "kl", (0.01, 0.05))] == [2, 0, 1]
    assert [row["class"] for row in drop_sensitivity.rank(points, 10.0, "kl", (0.01, 0.05))] == [
        "extreme",
        "insensitive",
        "sensitive",
    ]


def test_lists_of_blocks():
    assert blocks.parse_blocks("4,0-2,1") == [0, 1, 2, 4]
    assert blocks.layers_that_drop([4, 0, 1, 2]) == {"0-2": {"attention": "drop"}, "4": {"attention": "drop"}}
    assert blocks.share_of([3, 1, 0, 2], 50) == [1, 3] and blocks.share_of([3, 1, 0, 2], 0) == []
    for wrong in ("", "a", "3-1", "1-", "1,,2"):
        with pytest.raises(ValueError, match="expected numbers and ranges"):
            blocks.parse_blocks(wrong)


@pytest.mark.parametrize(
    "words, told",
    [
        (("distill", "--tp", 3, "--blocks", "0", "--out", "w"), "3 does not divide 8 attention heads"),
        (("distill", "--tp", 8, "--blocks", "0", "--out", "w"), "divide 4 key-value heads"),
        (("distill", "--tp", 2, "--blocks", "2", "--out", "w"), "layers 0 to 1, not 2"),
        (("distill", "--tp", 2, "--blocks", "0", "--out", "missing/w"), "--out missing/w: not a file"),
        (("distill", "--tp", 2, "--blocks", "0", "--out", "w", "--epochs", 0), "--epochs 0: at least 1"),
        (("distill", "--tp", 2, "--blocks", "0", "--out", "w", "--start", "no"), "--start no: no such file"),
        (("group", "--tp", 2, "--blocks", "x", "--out", "w"), "expected numbers and ranges"),
        (("sensitivity", "--tp", 1), "--tp 1: one rank sums nothing"),
        (
            ("sensitivity", "--tp", 2, "--thresholds", 2, 1),
            "2.0 1.0: expected two numbers, of which the first is not the larger",
        ),
        (("sensitivity", "--tp", 2, "--thresholds", "nan", "nan"), "nan nan: expected two numbers"),
        (("curve", "--tp", 2, "--percent", 120), "--percent 120.0: allowed are 0 to 100"),
        (("curve", "--tp", 2, "--codec", "drop"), "only attention under layers"),
        (("curve", "--tp", 2, "--weights", "no"), "--weights no: no such file"),
        (("distill", "--tp", 2, "--blocks", "0-999999999999", "--out", "w"), "beyond any model's number of layers"),
    ],
)
def test_mistakes_are_one_line(two_blocks, drop_text, tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["drop", *map(str, words), "--model", str(two_blocks), *map(str, drop_text)]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, told",
    [
        ("", "s.json is not valid JSON: Expecting value: line 1 column 1"),
        ("block,rank\n0,0\n1,1\n", "s.json is not valid JSON"),
        ("[]", "s.json: rows: None is not a list of blocks; expected what `megatron-comp drop sensitivity --json`"),
        ('{"rows": {"0": 1}}', "s.json: rows: {'0': 1} is not a list of blocks"),
        ('{"rows": []}', "s.json: rows: [] is not a list of blocks"),
        ('{"rows": [7]}', "s.json: rows: 0: 7 is not a block's row"),
        (
            '{"rows": [{"block": 0, "rank": 0}, {"block": 1}]}',
            "s.json: rows: 1: rank: None is not a number",
        ),
        ('{"rows": [{"block": "0", "rank": 0}]}', "s.json: rows: 0: block: '0' is not a number"),
        ('{"rows": [{"block": true, "rank": 0}]}', "s.json: rows: 0: block: True is not a number"),
        ('{"rows": [{"block": 1, "rank": 0}, {"block": 1, "rank": 1}]}', "blocks [1, 1] are not each of 0 to 1 once"),
        ('{"rows": [{"block": 0, "rank": NaN}]}', "s.json: rows: 0: rank: nan is not a number"),
        ('{"rows": [{"block": 0, "rank": 0}]}', "s.json is of a model of 1 layers; this one has 2"),
    ],
)
def test_a_sensitivity_file_of_another_kind(two_blocks, drop_text, tmp_path, monkeypatch, capsys, content, told):
    """Said before any rank starts."""
    monkeypatch.setattr(cli.ranks, "start", lambda *_: pytest.fail("ranks were started"))
    (tmp_path / "s.json").write_text(content)
    words = ("--tp", 2, "--model", two_blocks, *drop_text, "--sensitivity", tmp_path / "s.json")
    assert cli.main(["drop", "curve", *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert told in error and str(tmp_path) in error
