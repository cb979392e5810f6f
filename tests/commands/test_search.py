# SPDX-License-Identifier: Apache-2.0
"""The command on a tiny random Llama over two ranks: what it promises is what another command measures."""

import json
import shutil

import pytest
from searches import CODECS, LENGTH, rows_of, search

from megatron_comp import cli
from megatron_comp.policy import CompressionPolicy
from megatron_comp.wire.calibration import Calibration, CodecCost
from megatron_comp.wire.codec import Codec


def mixed(folder, llama, text, *arguments, **options):
    return search(folder, llama, text, *[w for c in CODECS for w in ("--codec", c)], *arguments, **options)


@pytest.fixture(scope="module", params=["gather_sum", "two_step"])
def done(request, llama, text, tmp_path_factory):
    """Folder of a finished search."""
    folder = tmp_path_factory.mktemp(request.param)
    files = ("--figure", "figure.png", "--json", "rows.json", "--min-bytes", "0")
    status, said = mixed(folder, llama, text, "--max-kl", "0.01", "--algorithm", request.param, *files)
    assert status == 0, said
    return folder


def test_policy_measures_as_promised(done, llama, text, command):
    """`evaluate` runs the written file on the same text: the same bits, the same KL, within the bound."""
    content = (done / "policy.yaml").read_text()
    policy = CompressionPolicy.from_file(done / "policy.yaml")
    assert policy.codecs() and content.startswith("# Found by megatron-comp search")
    evaluated = command(
        *("evaluate", "--model", llama, "--tp", 2, "--text", text, *LENGTH),
        *("--policy", done / "policy.yaml", "--json", done / "evaluated.json"),
    )
    assert evaluated.returncode == 0, evaluated.stderr
    _, measured = json.loads((done / "evaluated.json").read_text())["rows"]
    (chosen,) = (row for row in rows_of(done) if row["chosen"])
    assert measured["algorithm"] == chosen["algorithm"] == policy.algorithm
    assert float(chosen["bits_per_value"]) == pytest.approx(measured["bits_per_value"], abs=1e-9)
    assert chosen["name"] == f"mixed, {measured['bits_per_value']:.3f} bits"  # counted before it was measured
    assert float(chosen["kl"]) == pytest.approx(measured["kl"], rel=1e-6)
    assert 0.005 < measured["kl"] <= 0.01
    assert f"{measured['bits_per_value']:.3f} bits per value, KL {measured['kl']:.5f}" in content


def test_predicts_what_is_measured(done):
    """Sensitivities alone, from 126 tokens, foresee the KL of policies that were never run before."""
    tried = [row for row in rows_of(done) if row["kind"] == "mixed"]
    assert tried
    for row in tried:
        assert 0.6 < float(row["predicted_kl"]) / float(row["kl"]) < 1.5


def test_beats_one_codec_everywhere(done):
    """Every preset needs more KL for its bits, or more bits for its KL."""
    rows = rows_of(done)
    (chosen,) = (row for row in rows if row["chosen"])
    presets = [row for row in rows if row["kind"] == "preset"]
    assert [row["name"] for row in presets] and all(float(row["kl"]) > float(chosen["kl"]) for row in presets)
    assert (done / "figure.png").stat().st_size > 10_000
    assert len(json.loads((done / "rows.json").read_text())["rows"]) == len(rows)


def test_resumed_equals_uninterrupted(done, llama, text, tmp_path):
    """Ended in the middle of the sensitivities, or between two tried policies."""
    algorithm = done.name.rstrip("0123456789")
    saves = 1 if algorithm == "gather_sum" else 4
    arguments = ("--max-kl", "0.01", "--min-bytes", "0", "--algorithm", algorithm)
    assert mixed(tmp_path, llama, text, *arguments, saves=saves)[0] == 130
    assert not (tmp_path / "policy.yaml").exists()
    status, said = mixed(tmp_path, llama, text, *arguments)
    assert status == 0 and "going on from state.json" in said
    for file in ("policy.yaml", "rows.csv", "state.json"):
        assert (tmp_path / file).read_bytes() == (done / file).read_bytes()


def test_finished_state_serves_other_bounds(done, llama, text, tmp_path):
    """Without a new sensitivity pass; and a state of other settings is refused by name."""
    shutil.copy(done / "state.json", tmp_path)
    before = json.loads((tmp_path / "state.json").read_text())
    assert mixed(tmp_path, llama, text, "--max-perplexity-increase", "9")[0] == 0
    after = json.loads((tmp_path / "state.json").read_text())
    assert after["sensitivity"] == before["sensitivity"]
    assert CompressionPolicy.from_file(tmp_path / "policy.yaml").min_bytes == "auto"
    status, said = mixed(tmp_path, llama, text, "--max-kl", "0.01", "--tokens", "192")
    assert status == 2 and "of another run: it has tokens 128, not 192" in said


def test_bound_out_of_reach(llama, text, tmp_path):
    arguments = ("--max-kl", "1e-9", "--codec", "int4:32:e5m3", "--codec", "int8:32:e5m3")
    status, said = search(tmp_path, llama, text, *arguments)
    assert status == 2 and "KL <= 1e-09 cannot be kept with these candidates: the best of them cost" in said
    assert not (tmp_path / "policy.yaml").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "a bound is needed: --max-kl"),
        (["--max-kl", "0"], "--max-kl 0.0: allowed are numbers above 0"),
        (["--max-kl", "0.1", "--tp", "1"], "--tp 1: one rank sums nothing"),
        (["--max-kl", "0.1", "--codec", "int4:32:fp16>mxfp8"], "candidates are single codecs"),
        (["--max-kl", "0.1", "--codec", "mxfp5"], "codec 'mxfp5' is neither a preset"),
        (["--max-kl", "0.1", "--context", "1"], "--context 1: allowed are 2 to --tokens"),
        (["--max-kl", "0.1", "--min-bytes", "64q"], "policy: min_bytes: '64q' is neither 'auto' nor a number"),
        (["--max-kl", "0.1", "--out", "nowhere/policy.yaml"], "--out nowhere/policy.yaml: not a file"),
        (["--max-kl", "0.1", "--text", "nowhere.txt"], "--text nowhere.txt: no such file"),
        (["--max-kl", "0.1", "--link", "1gbit"], "--link is for --with-drop"),
        (["--max-kl", "0.1", "--with-drop"], "--with-drop needs --link, a rate or one of pcie3x16"),
        (["--max-kl", "0.1", "--with-drop", "--link", "fast"], "--link 'fast' is no rate"),
        (["--max-kl", "0.1", "--with-drop", "--link", "1gbit", "--gpu", "L5"], "--gpu L5: allowed are L4"),
        (["--max-kl", "0.1", "--with-drop", "--link", "1gbit", "--weights", "w"], "--weights and --weights-out go"),
    ],
)
def test_seen_before_any_rank_starts(capsys, monkeypatch, llama, text, arguments, message):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(cli.ranks, "start", lambda *_: pytest.fail("ranks were started"))
    required = ["search", "--model", str(llama), "--tp", "2", "--text", str(text), *LENGTH, "--out", "policy.yaml"]
    assert cli.main([*required, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_candidates_of_unknown_time(capsys, monkeypatch, llama, text, tmp_path):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(cli.ranks, "start", lambda *_: 0)
    costs = {str(Codec.parse("mxfp4")): CodecCost()}
    Calibration(codecs=costs, measured={"ranks": 2, "device": "cpu"}).write(tmp_path / "measured.yaml")
    required = ["search", "--model", str(llama), "--tp", "2", "--text", str(text), *LENGTH, "--with-drop"]
    required += ["--max-kl", "0.1"]
    required += ["--out", str(tmp_path / "policy.yaml"), "--calibration", str(tmp_path / "measured.yaml"), "--codec"]
    assert cli.main([*required, "mxfp8"]) == 2
    assert "measured.yaml: it has no candidate's time, only those of fp4_e2m1:32:e8m0" in capsys.readouterr().err
    assert cli.main([*required, "mxfp8", "--codec", "mxfp4"]) == 0


def test_what_has_moved_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["search", "--model", "llama", "--paper", "--tp", "2"])
    assert ended.value.code == 2 and "--paper is now a command of its own" in (said := capsys.readouterr().err)
    assert said.endswith("python -m research.paper_search\n")
