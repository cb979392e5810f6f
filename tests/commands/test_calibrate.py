# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp calibrate`: lines through times, the size from which compression pays, and a run on real ranks."""

import argparse
import io
import json
import socket
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from ranks import run_ranks

from megatron_comp import cli
from megatron_comp.bench import fit
from megatron_comp.bench.calibration import CHUNKS, SMALL_SAMPLES, Scope, Timings, measure
from megatron_comp.commands import calibrate
from megatron_comp.commands.arguments import calibrate as arguments_of_calibrate
from megatron_comp.commands.calibrate import _advice
from megatron_comp.wire.calibration import LEVEL_LINKS, LINKS, Calibration, CodecCost, Link
from megatron_comp.wire.codec import Codec
from megatron_comp.wire.cost import choose_algorithm, pays, stock_seconds, sum_seconds, wire_and_work
from megatron_comp.wire.topology import Islands
from megatron_comp.wire.traffic import ring_bytes

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
    return Calibration(links, {str(MXFP4): cost}, margin, {"ranks": ranks, "device": "cpu"})


@pytest.mark.parametrize("hidden", [0.0, 0.3, 1.0])
def test_times_that_follow_the_model_give_back_its_calibration(hidden):
    """Exact times in, the same calibration out, and no more margin than the least."""
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
    made = fit.calibration(setting, Timings(samples), truth.measured)
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
    assert fit.calibration(setting, Timings(samples), truth.measured).margin == pytest.approx(max(0.1, *lost))


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
    made = fit.calibration(setting, Timings(samples), {"ranks": 2, "device": "cpu"})
    assert pays((1024, 576), 2, MXFP4, 2, "auto", made)
    assert not pays((32, 576), 2, MXFP4, 2, "auto", made)


def decided(rows, calibration, hidden=256):
    return pays((rows, hidden), 4, MXFP4, 3, "auto", calibration)


def test_compressed_sizes_begin_where_the_gate_turns():
    calibration = known()
    ((first, last),) = fit.compressed_sizes(MXFP4, 4, calibration, hidden=256)
    rows = first // (256 * 4)
    assert rows > 1 and last is None
    assert decided(rows, calibration) and not decided(rows - 1, calibration)


def test_compressed_sizes_may_have_a_gap():
    """Small gathers that beat a slow all-reduce of small messages, a fast one between, the wire's rate after it."""
    slow_first = Link(1e7, 1e-4, ((4096.0, 9e-3), (90000.0, 5e-4), (1e6, 9e-2)))
    calibration = replace(known(), links=known().links | {"all_reduce": slow_first})
    ranges = fit.compressed_sizes(MXFP4, 4, calibration, hidden=256)
    assert len(ranges) == 2 and ranges[0][0] == 256 * 4 and ranges[1][1] is None
    for first, last in ranges:
        assert decided(first // 1024, calibration) and (first == 1024 or not decided(first // 1024 - 1, calibration))
        assert last is None or (decided(last // 1024, calibration) and not decided(last // 1024 + 1, calibration))


def test_sizes_that_pay_grow_with_the_link():
    sizes = [fit.compressed_sizes(MXFP4, 4, known(rate), hidden=256)[0][0] for rate in (1e6, 1e7, 1e8)]
    assert sizes == sorted(sizes)
    assert fit.compressed_sizes(MXFP4, 4, known(1e12)) == []
    free = known(1e7, encode_fixed_s=0.0, margin=0.0)
    assert fit.compressed_sizes(MXFP4, 4, free, hidden=256)[0][0] < sizes[1]


def test_nothing_is_gained_past_a_measured_loss():
    """By the line through its points the codec would win just beyond the largest size; the gate stays closed there."""
    rows, fixed = 1024, 0.2
    largest = float(ring_bytes(4 * 256 * rows, 3))
    measured = Link(1e7, 1e-4, tuple((size, 1e-4 + size / 1e7) for size in (largest / 2, largest)))
    line = known(1e7, encode_fixed_s=fixed)
    calibration = replace(line, links=line.links | {"all_reduce": measured})
    assert not decided(rows, line) and decided(4 * rows, line)
    assert not decided(rows, calibration) and not decided(4 * rows, calibration)
    assert fit.compressed_sizes(MXFP4, 4, calibration, hidden=256) == []
    gains = known(1e7)
    gains = replace(gains, links=gains.links | {"all_reduce": measured})
    assert decided(rows, gains) and decided(1000 * rows, gains)


def test_stock_goes_by_ring_bytes():
    assert stock_seconds(3000, 3, known()) == pytest.approx(1e-4 + ring_bytes(3000, 3) / 1e7)


def advice(*rows):
    names = ("codec", "compressed_sizes", "best_speedup", "best_bytes")
    return _advice([dict(zip(names, row)) for row in rows], 0.1)


def test_advice():
    slow, gated = ("mxfp4", [(4096, None)], 0.9, 8), ("int8", [], 1.2, 8)
    assert advice(slow) == (
        "Leave compression off here: no codec was faster than the stock all-reduce at any measured size."
    )
    assert advice(slow, gated).startswith("Leave compression off here: no codec is predicted to beat")
    good = [(f"c{x}", [(1024, 2048), (4096 * x, None)], float(x), 65536 * x) for x in (2, 3)]
    assert advice(slow, gated, *good) == (
        "Compress: c3 was 3.00 times as fast as the stock all-reduce at 196,608 bytes. `min_bytes: auto` compresses "
        "messages of 1,024 to 2,048, 12,288 and more bytes in this codec, and leaves the others uncompressed."
    )


def test_codecs_of_policies(tmp_path):
    """Those of all layers, sites and phases, both of a pair; the default ones where nobody names any."""

    def codecs(*arguments):
        parser = argparse.ArgumentParser()
        arguments_of_calibrate.add_arguments(parser)
        return [*calibrate.check(parser.parse_args(["--tp", "2", *arguments])).codecs]

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
        (["--tp", "1"], "--tp 1: a link needs at least two"),
        (["--tp", "2", "--runs", "0"], "--runs 0"),
        (["--tp", "2", "--tokens", "8", "--tokens", "8"], "--tokens 8: two different sizes"),
        (["--tp", "2", "--codec", "mxfp4>mxfp8"], "mxfp4>mxfp8"),
        (["--tp", "2", "--codec", "mxfp5"], "codec 'mxfp5'"),
        (["--tp", "2", "--policy", "nowhere.yaml"], "nowhere.yaml"),
        (["--tp", "2", "--cuda-graphs"], "--cuda-graphs needs a GPU: without one nothing can be captured"),
        (["--tp", "2", "--out", "nowhere/calibration.yaml"], "--out nowhere/calibration.yaml"),
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


def test_a_run_leaves_a_calibration_that_later_runs_find(tmp_path):
    words = ["--codec", "mxfp4", "--tokens", "1", "--tokens", "16", "--rounds", "2", "--hidden", "512"]
    files = ["--json", str(tmp_path / "rows.json"), "--out", str(tmp_path / "calibration.yaml")]
    first, second = run_ranks(calibrated, 2, words + files)
    made = Calibration.from_file(tmp_path / "calibration.yaml")
    assert (made.ranks, made.measured["backend"], made.measured["dtype"]) == (2, "gloo", "float32")
    assert set(made.codecs) == {str(MXFP4)} and made.margin >= 0.1 and 0 <= made.hidden <= 1
    assert all(1e5 < link.bytes_per_s < 1e13 for link in made.links.values())
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row.get("collective") or row["codec"] for row in rows] == [*LINKS, "mxfp4"]
    assert str(tmp_path / "calibration.yaml") in first and second == ""
    assert ("Compress: " in first) != ("Leave compression off" in first)


class Recorded:
    """In place of a CUDA graph: runs what it captures, and nothing afterwards."""

    def __init__(self):
        self.replays, self.pool = 0, None

    def replay(self):
        self.replays += 1


def replays(rank, world_size):
    """Of each graph, on a machine without CUDA, and the pools of all of them."""
    graphs, pool = [], object()

    @contextmanager
    def capture(graph, pool, capture_error_mode):
        graph.pool = pool, capture_error_mode
        graphs.append(graph)
        yield

    scope = Scope({"mxfp4": MXFP4}, [(1, 64), (2, 64)], "float32", rounds=2, graphs=True)
    with (
        patch.object(torch.cuda, "CUDAGraph", Recorded),
        patch.object(torch.cuda, "graph", capture),
        patch.object(torch.cuda, "graph_pool_handle", lambda: pool),
    ):
        timings = measure(scope, torch.device("cpu"))
    counts = {what: len(samples) for what, samples in timings.samples.items()}
    return counts, [graph.replays for graph in graphs], {graph.pool == (pool, "thread_local") for graph in graphs}


def test_replays_of_graphs_are_timed():
    for counts, replayed, pools in run_ranks(replays, 2):
        assert [*counts.values()] == replayed and set(replayed) == {2 * SMALL_SAMPLES} and pools == {True}


def calibrated_on_machines(rank, world_size, arguments):
    socket.gethostname = lambda: f"machine{rank // 2}"
    return calibrated(rank, world_size, arguments)


def test_machines_of_several_ranks_are_measured_in_two_levels(tmp_path):
    """And what is found there is what `auto` goes by."""
    words = ["--codec", "mxfp4", "--tokens", "1", "--tokens", "64", "--rounds", "2", "--hidden", "512"]
    run_ranks(calibrated_on_machines, 4, [*words, "--out", str(tmp_path / "calibration.yaml")])
    made, islands = Calibration.from_file(tmp_path / "calibration.yaml"), Islands.of_size(4, 2)
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
