"""`megatron-comp calibrate`: lines through times, the size from which compression pays, and a run on real ranks."""

import argparse
import io
import json
import socket
from contextlib import redirect_stdout
from dataclasses import replace

import pytest
from ranks import run_ranks

from megatron_comp import cli
from megatron_comp.bench import fit
from megatron_comp.bench.calibration import CHUNKS, Scope, Timings
from megatron_comp.commands import calibrate
from megatron_comp.commands.calibrate import _advice
from megatron_comp.wire.codec import Codec
from megatron_comp.wire.cost import choose_algorithm, pays, ring_bytes, stock_seconds, sum_seconds, wire_and_work
from megatron_comp.wire.figures import LEVEL_LINKS, LINKS, CodecCost, Figures, Link
from megatron_comp.wire.topology import Islands

MXFP4 = Codec.parse("mxfp4")


@pytest.mark.parametrize(
    "points, expected",
    [
        ([(10, 3.0), (20, 5.0), (30, 7.0)], (1.0, 0.2)),
        ([(10, 2.0), (20, 4.0)], (0.0, 0.2)),
        ([(10, 2.0), (20, 2.0)], (2.0, 0.0)),
    ],
    ids=["a line", "through zero", "flat"],
)
def test_points_on_a_line_give_it_back(points, expected):
    assert fit.line(points) == pytest.approx(expected)


@pytest.mark.parametrize("points", [[(1, 5.0), (100, 1.0)], [(1, 0.1), (10, 2.0), (20, 9.0)]])
def test_nothing_takes_less_than_no_time(points):
    fixed, slope = fit.line(points)
    assert fixed >= 0 and slope >= 0 and max(fixed, slope) > 0


def test_small_sizes_count_as_much_as_large_ones():
    """Relative errors: a millisecond that is missed at a second counts less than one that is missed at two."""
    fixed, slope = fit.line([(1, 0.002), (1000, 1.1), (2000, 2.0)])
    assert abs((fixed + slope) / 0.002 - 1) < 0.01


def known(rate=1e7, margin=0.1, encode_fixed_s=1e-4, ranks=3):
    cost = CodecCost(encode_fixed_s, 1e-9, 1e-4, 1e-9)
    links = dict.fromkeys(LINKS, Link(rate, 1e-4))
    return Figures(links, {str(MXFP4): cost}, margin, {"ranks": ranks, "device": "cpu"})


@pytest.mark.parametrize("hidden", [0.0, 0.3, 1.0])
def test_times_that_follow_the_model_give_back_its_figures(hidden):
    """Exact times in, the same figures out, and no more margin than the least."""
    codecs = {"mxfp4": MXFP4}
    setting, samples = Scope(codecs, [(4, 1024), (32, 1024), (192, 1024)], "float32", 1), {}
    truth = replace(known(), hidden=hidden)
    for shape in setting.shapes:
        for name in LINKS:
            samples[name, shape] = [truth.links[name].seconds(fit._received(setting, name, shape, 3))]
        values, cost = shape[0] * shape[1], truth.cost(MXFP4)
        samples["encode", shape, "mxfp4"] = [cost.encode_fixed_s + values * cost.encode_s_per_value]
        samples["decode", shape, "mxfp4"] = [cost.decode_fixed_s + 3 * values * cost.decode_s_per_value]
        for way in ("gather_sum", "two_step"):
            samples["sum", shape, "mxfp4", way] = [sum_seconds(shape, MXFP4, 3, way, truth)]
            for chunks in (1, CHUNKS):
                wire, work = wire_and_work(shape, MXFP4, 3, way, truth, chunks)
                together = hidden * min(wire, work) * (chunks - 1) / chunks
                samples["pieces", shape, "mxfp4", way, chunks] = [wire + work - together]
    made = fit.figures(setting, Timings(samples), truth.measured)
    for name in LINKS:
        assert made.links[name].bytes_per_s == pytest.approx(1e7) and made.links[name].latency_s == pytest.approx(1e-4)
        assert len(made.links[name].points) == 3
    assert list(made.cost(MXFP4).__dict__.values()) == pytest.approx([1e-4, 1e-9, 1e-4, 1e-9])
    assert made.hidden == pytest.approx(hidden, abs=1e-9)
    assert made.margin == 0.1
    # Whole sums that take three times as long as their parts say: those that then lose to stock must be kept.
    promised = []
    for what in samples:
        if what[0] == "sum":
            promised.append(samples["all_reduce", what[1]][0] / samples[what][0])
            samples[what] = [3 * samples[what][0]]
    lost = [gain - 1 for gain in promised if gain < 3]
    assert 0 < len(lost) < len(promised)
    assert fit.figures(setting, Timings(samples), truth.measured).margin == pytest.approx(max(0.1, *lost))


def test_a_link_goes_by_its_largest_size():
    """A shaper lets the first bytes pass at once; prefill goes by the rate of those that follow."""
    fixed, slope = fit.line_to_largest([(1e3, 1e-3), (1e5, 1.2e-3), (1e6, 80e-3)])
    assert fixed + 1e6 * slope == pytest.approx(80e-3) and 0 <= fixed < 2e-3


def test_small_messages_that_a_shaper_lets_through_do_not_close_the_gate_for_large_ones():
    """All-reduce of the small sizes is over at once, so compressing these loses; of the largest it gains fourfold."""
    rate, burst = 1.25e7, 256e3
    setting, samples = Scope({"mxfp4": MXFP4}, [(1, 576), (32, 576), (256, 576), (1024, 576)], "bfloat16", 1), {}

    def on_wire(nbytes):
        return 2e-4 + max(0.0, nbytes - burst) / rate

    for shape in setting.shapes:
        for name in LINKS:
            samples[name, shape] = [on_wire(fit._received(setting, name, shape, 2))]
        values = shape[0] * shape[1]
        samples["encode", shape, "mxfp4"] = samples["decode", shape, "mxfp4"] = [1e-4 + 3e-9 * values]
        for way in ("gather_sum", "two_step"):
            taken = 2e-4 + 6e-9 * values + on_wire(MXFP4.message_bytes(shape))
            samples["sum", shape, "mxfp4", way] = [taken]
            samples |= {("pieces", shape, "mxfp4", way, chunks): [taken] for chunks in (1, CHUNKS)}
    made = fit.figures(setting, Timings(samples), {"ranks": 2, "device": "cpu"})
    assert pays((1024, 576), 2, MXFP4, 2, "auto", made)
    assert not pays((32, 576), 2, MXFP4, 2, "auto", made)


def test_the_size_that_pays_is_where_the_gate_turns():
    figures = known()
    rows = fit.pays_from(MXFP4, 4, 3, figures, hidden=256) // (256 * 4)
    assert rows > 1
    assert pays((rows, 256), 4, MXFP4, 3, "auto", figures) and not pays((rows - 1, 256), 4, MXFP4, 3, "auto", figures)


def test_sizes_that_pay_grow_with_the_link():
    sizes = [fit.pays_from(MXFP4, 4, 3, known(rate), hidden=256) for rate in (1e6, 1e7, 1e8)]
    assert sizes == sorted(sizes) and None not in sizes
    assert fit.pays_from(MXFP4, 4, 3, known(1e12)) is None
    assert fit.pays_from(MXFP4, 4, 3, known(1e7, encode_fixed_s=0.0, margin=0.0), hidden=256) < sizes[1]


def test_stock_goes_by_ring_bytes():
    assert stock_seconds(3000, 3, known()) == pytest.approx(1e-4 + ring_bytes(3000, 3) / 1e7)


def test_advice():
    rows = [{"codec": "mxfp4", "pays_from_bytes": None, "speedup": 0.5}]
    assert _advice(rows, 8, 0.1).startswith("Leave compression off")
    rows += [{"codec": f"c{x}", "pays_from_bytes": 4096 * x, "speedup": float(x)} for x in (2, 3)]
    assert _advice(rows, 8, 0.1).startswith("Compress: c3 was 3.00 times") and "12,288 bytes" in _advice(rows, 8, 0.1)


def test_codecs_of_policies(tmp_path):
    """Those of all layers, sites and phases, both of a pair; the default ones where nobody names any."""

    def codecs(*arguments):
        parser = argparse.ArgumentParser()
        calibrate.add_arguments(parser)
        return [*calibrate.check(parser.parse_args(["--ranks", "2", *arguments])).codecs]

    (tmp_path / "a.yaml").write_text("codec: mxfp4\nlayers: {1: {attention: drop, mlp: 'int8:32:fp16>int4:32:fp16'}}\n")
    (tmp_path / "b.yaml").write_text("codec: none\nphases: {prefill: mxfp8}\n")
    a, b = (f"--policy={tmp_path / name}.yaml" for name in "ab")
    mxfp4, mxfp8 = (str(Codec.parse(name)) for name in ("mxfp4", "mxfp8"))
    assert sorted(codecs(a)) == sorted([mxfp4, "int8:32:fp16", "int4:32:fp16"])
    assert codecs("--codec=nvfp4", b) == ["nvfp4", mxfp8]
    assert codecs() == [*calibrate.CODECS]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ranks", "1"], "--ranks 1: a link needs at least two"),
        (["--ranks", "2", "--rounds", "0"], "--rounds 0"),
        (["--ranks", "2", "--tokens", "8", "--tokens", "8"], "--tokens 8: two different sizes"),
        (["--ranks", "2", "--codec", "mxfp4>mxfp8"], "mxfp4>mxfp8"),
        (["--ranks", "2", "--codec", "mxfp5"], "codec 'mxfp5'"),
        (["--ranks", "2", "--policy", "nowhere.yaml"], "nowhere.yaml"),
        (["--ranks", "2", "--out", "nowhere/figures.yaml"], "--out nowhere/figures.yaml"),
    ],
)
def test_seen_before_any_rank_starts(capsys, monkeypatch, arguments, message):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(cli.ranks, "start", lambda *_: pytest.fail("ranks were started"))
    assert cli.main(["calibrate", *arguments]) == 2
    assert message in capsys.readouterr().err


def calibrated(rank, world_size, arguments):
    """What this rank printed."""
    with redirect_stdout(io.StringIO()) as said:
        args = cli._parser().parse_args(["calibrate", "--ranks", str(world_size), *arguments])
        calibrate.run(args)
    return said.getvalue()


def test_a_run_leaves_figures_that_later_runs_find(tmp_path):
    words = ["--codec", "mxfp4", "--tokens", "1", "--tokens", "16", "--rounds", "2", "--hidden", "512"]
    files = ["--json", str(tmp_path / "rows.json"), "--out", str(tmp_path / "figures.yaml")]
    first, second = run_ranks(calibrated, 2, words + files)
    made = Figures.from_file(tmp_path / "figures.yaml")
    assert (made.ranks, made.measured["backend"], made.measured["dtype"]) == (2, "gloo", "float32")
    assert set(made.codecs) == {str(MXFP4)} and made.margin >= 0.1 and 0 <= made.hidden <= 1
    assert all(1e5 < link.bytes_per_s < 1e13 for link in made.links.values())
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row.get("collective") or row["codec"] for row in rows] == [*LINKS, "mxfp4"]
    assert str(tmp_path / "figures.yaml") in first and second == ""
    assert ("Compress: " in first) != ("Leave compression off" in first)


def calibrated_on_machines(rank, world_size, arguments):
    socket.gethostname = lambda: f"machine{rank // 2}"
    return calibrated(rank, world_size, arguments)


def test_machines_of_several_ranks_are_measured_in_two_levels(tmp_path):
    """And what is found there is what `auto` goes by."""
    words = ["--codec", "mxfp4", "--tokens", "1", "--tokens", "64", "--rounds", "2", "--hidden", "512"]
    run_ranks(calibrated_on_machines, 4, [*words, "--out", str(tmp_path / "figures.yaml")])
    made, islands = Figures.from_file(tmp_path / "figures.yaml"), Islands.of_size(4, 2)
    assert made.measured["hosts"] == 2
    for links in (made.inside, made.across):
        assert set(links) == set(LEVEL_LINKS) and all(len(link.points) == 2 for link in links.values())
        # A rank receives from one other what it sends, all of it or half.
        assert [points[0] for points in links["all_gather"].points] == [512, 32768]
        assert [points[0] for points in links["all_to_all"].points] == [256, 16384]
    slow = replace(made, links=dict.fromkeys(LINKS, Link(1e3, 0.0)))
    assert choose_algorithm((64, 512), MXFP4, 4, "auto", slow, islands) == "hierarchical"
    fast = replace(made, links=dict.fromkeys(LINKS, Link(1e12, 0.0)))
    assert choose_algorithm((64, 512), MXFP4, 4, "auto", fast, islands) in ("gather_sum", "two_step")
