# SPDX-License-Identifier: Apache-2.0
"""What is predicted to move, and which algorithm `auto` takes from it."""

import math
from dataclasses import replace

import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_comp.wire.calibration import ASSUMED, LINKS, Calibration, CodecCost, Link
from megatron_comp.wire.codec import parse_codec
from megatron_comp.wire.cost import (
    FLAT,
    choose_algorithm,
    choose_chunks,
    choose_scatter,
    pays,
    scatter_seconds,
    stock_seconds,
    sum_seconds,
)
from megatron_comp.wire.topology import Islands
from megatron_comp.wire.traffic import received_bytes, ring_bytes

RANKS = [2, 3, 4, 5, 6, 8]
SHAPES = [(1, 576), (7, 33), (5, 1), (2, 3, 576), (512, 8192), (33,), (4, 1024, 4096)]


@pytest.mark.parametrize("shape", [*SHAPES, (100_000, 16384)], ids=str)
@pytest.mark.parametrize("name", oracles.PRESETS)
def test_auto_with_two_ranks_always_gathers(name, shape):
    assert choose_algorithm(shape, parse_codec(name), 2) == "gather_sum"


@pytest.mark.parametrize("ranks", [4, 5, 6, 8, 16])
@pytest.mark.parametrize("name", oracles.PRESETS)
def test_auto_goes_from_gather_sum_to_two_step_once(name, ranks):
    """Small messages save the second start, large ones the bytes; in between there is one turning point."""
    chosen = [choose_algorithm((2**power, 4096), parse_codec(name), ranks) for power in range(16)]
    assert (chosen[0], chosen[-1]) == ("gather_sum", "two_step")
    assert chosen == sorted(chosen)


@pytest.mark.parametrize("ranks", [3, 4, 8])
@pytest.mark.parametrize("name", oracles.PRESETS)
def test_auto_weighs_the_bytes_saved_against_a_second_start(name, ranks):
    """An unmeasured link: 50 us to start a phase, 25 Gbit/s, so two steps must save 156,250 bytes."""
    codec = parse_codec(name)
    for factor in (1, 2, 4, 8, 16, 32, 64):
        shape = (48 * ranks * factor, 256)
        saved = (ranks - 1) * (1 - 2 / ranks) * codec.message_bytes(shape)
        assert choose_algorithm(shape, codec, ranks) == ("two_step" if saved > 156_250 else "gather_sum")


def test_auto_looks_at_shape_codec_and_ranks_only(monkeypatch):
    """The same everywhere and every time: no clock, no rank, no environment."""
    import torch.distributed as dist

    def forbidden(*_, **__):
        raise AssertionError("a choice must not depend on this")

    for name in ("get_rank", "get_world_size", "is_initialized"):
        monkeypatch.setattr(dist, name, forbidden)
    for shape in SHAPES:
        for ranks in RANKS:
            choices = {choose_algorithm(torch_size, parse_codec("mxfp4"), ranks) for torch_size in (shape, list(shape))}
            assert len(choices) == 1


@pytest.mark.parametrize("algorithm", FLAT)
def test_an_algorithm_that_is_named_is_taken(algorithm):
    for shape in SHAPES:
        assert choose_algorithm(shape, parse_codec("mxfp4"), 4, algorithm) == algorithm


def test_pairs_take_two_steps():
    pair = parse_codec("mxfp4>mxfp8")
    assert choose_algorithm((1, 8), pair, 2) == choose_algorithm((1, 8), pair, 2, "two_step") == "two_step"
    with pytest.raises(ValueError, match="gather_sum has one phase and takes one codec, not fp4_e2m1:32:e8m0>"):
        choose_algorithm((1, 8), pair, 2, "gather_sum")


@pytest.mark.parametrize("algorithm", ["ring", "", "GATHER_SUM", None])
def test_unknown_algorithms(algorithm):
    with pytest.raises(
        ValueError, match=f"unknown algorithm {algorithm!r}; known are auto, gather_sum, two_step, hierarchical"
    ):
        choose_algorithm((1, 8), parse_codec("mxfp4"), 2, algorithm)


# Round numbers: bytes and values that a person can check.
CALIBRATION = Calibration(
    {
        "all_reduce": Link(1e6, 1e-3),
        "reduce_scatter": Link(2e6, 2e-3),
        "all_gather": Link(4e6, 3e-3),
        "all_to_all": Link(5e6, 4e-3),
    },
    {
        str(parse_codec("mxfp4")): CodecCost(1e-4, 1e-9, 2e-4, 3e-9),
        str(parse_codec("mxfp8")): CodecCost(5e-4, 5e-9, 6e-4, 7e-9),
    },
    0.1,
    {"ranks": 4, "device": "cpu"},
)
SMALL = (64, 256)  # one chunk: 16384 values, a message of 8192 + 512 bytes


def test_predicted_times_of_one_chunk_add_up():
    values, message, codec = 64 * 256, 8704, parse_codec("mxfp4")
    assert stock_seconds(65536, 4, CALIBRATION) == pytest.approx(1e-3 + 1.5 * 65536 / 1e6)
    assert stock_seconds(65536, 4, CALIBRATION, scatter=True) == pytest.approx(2e-3 + 0.75 * 65536 / 2e6)
    gathered = 3e-3 + 3 * message / 4e6 + 3e-4 + values * (1e-9 + 4 * 3e-9)
    assert sum_seconds(SMALL, codec, 4, "gather_sum", CALIBRATION) == pytest.approx(gathered)
    wire = 4e-3 + 0.75 * message / 5e6 + 3e-3 + 0.75 * message / 4e6
    work = 1e-4 + 2e-4 + 1e-4 + 2e-4 + values * (1e-9 + 3e-9 + 0.25e-9 + 3e-9)
    assert sum_seconds(SMALL, codec, 4, "two_step", CALIBRATION) == pytest.approx(wire + work)
    wire = 4e-3 + 0.75 * message / 5e6
    scattered = wire + 1e-4 + 2e-4 + values * (1e-9 + 3e-9)
    assert scatter_seconds(SMALL, codec, 4, CALIBRATION) == pytest.approx(scattered)


def test_a_pair_takes_each_phase_at_its_own_cost():
    first, second = (parse_codec("mxfp4>mxfp8").first, parse_codec("mxfp4>mxfp8").second)
    wire = 4e-3 + 0.75 * first.message_bytes(SMALL) / 5e6 + 3e-3 + 0.75 * second.message_bytes(SMALL) / 4e6
    work = 1e-4 + 2e-4 + 5e-4 + 6e-4 + 16384 * (1e-9 + 3e-9 + 5e-9 / 4 + 7e-9)
    assert sum_seconds(SMALL, parse_codec("mxfp4>mxfp8"), 4, "two_step", CALIBRATION) == pytest.approx(wire + work)


def test_chunks_hide_all_of_the_shorter_but_one_chunk():
    """2048 rows of 4096: 4.4 MB of message in 16 chunks of 256 KB and more."""
    shape, values, codec = (2048, 4096), 2048 * 4096, parse_codec("mxfp4")
    wire = 3e-3 + 3 * codec.message_bytes(shape) / 4e6
    work = 16 * 3e-4 + values * (1e-9 + 4 * 3e-9)
    assert wire > work
    assert sum_seconds(shape, codec, 4, "gather_sum", CALIBRATION) == pytest.approx(wire + work / 16)


@pytest.mark.parametrize("way", FLAT)
@pytest.mark.parametrize("name", ["mxfp4", "mxfp4>mxfp8"])
def test_the_number_of_chunks_that_is_predicted_fastest(name, way):
    """Fixed costs of the chunks against what they hide, from the formula by hand."""
    shape, codec = (2048, 4096), parse_codec(name)
    if name == "mxfp4>mxfp8" and way == "gather_sum":
        return
    values, message = math.prod(shape), parse_codec("mxfp4").message_bytes(shape)
    for hidden in (0.0, 0.02, 0.2, 1.0):
        known = replace(CALIBRATION, hidden=hidden)
        seconds = []
        for n in range(1, 17):
            if way == "gather_sum":
                wire = 3e-3 + 3 * message / 4e6
                work = n * (1e-4 + 2e-4) + values * (1e-9 + 4 * 3e-9)
            elif name == "mxfp4":
                wire = 4e-3 + 0.75 * message / 5e6 + 3e-3 + 0.75 * message / 4e6
                work = n * (1e-4 + 2e-4 + 1e-4 + 2e-4) + values * (1e-9 + 3e-9 + 0.25e-9 + 3e-9)
            else:
                longer = parse_codec("mxfp8").message_bytes(shape)
                wire = 4e-3 + 0.75 * message / 5e6 + 3e-3 + 0.75 * longer / 4e6
                work = n * (1e-4 + 2e-4 + 5e-4 + 6e-4) + values * (1e-9 + 3e-9 + 5e-9 / 4 + 7e-9)
            seconds.append(wire + work - hidden * min(wire, work) * (1 - 1 / n))
        best = choose_chunks(shape, codec, 4, way, known, 1 << 18)
        assert best == 1 + seconds.index(min(seconds))
        assert sum_seconds(shape, codec, 4, way, known) == pytest.approx(min(seconds))
        assert (best == 1) == (hidden == 0.0) or 0 < hidden < 1


def test_chunks_go_by_size_where_no_codec_was_measured():
    shape, codec = (2048, 4096), parse_codec("mxfp4")
    assert choose_chunks(shape, codec, 4, "gather_sum", ASSUMED, 1 << 20) == codec.message_bytes(shape) // (1 << 20)
    assert choose_chunks((31, 4096), codec, 4, "gather_sum", ASSUMED, 1) == 1


def calibration(rate, latency=1e-4, margin=0.1, speed=1.0):
    """A link of that rate; codecs that take 1 ns a value at speed 1."""
    cost = CodecCost(1e-5 / speed, 1e-9 / speed, 1e-5 / speed, 1e-9 / speed)
    named = {str(parse_codec(name)): cost for name in ("mxfp4", "int8:32:fp16")}
    return Calibration(dict.fromkeys(LINKS, Link(rate, latency)), named, margin, {"ranks": 4, "device": "cpu"})


RATES = [10.0**power for power in range(5, 12)]


@given(
    rows=st.integers(1, 4096),
    ranks=st.sampled_from([2, 3, 4, 8]),
    itemsize=st.sampled_from([2, 4]),
    name=st.sampled_from(["mxfp4", "int8:32:fp16"]),
    way=st.sampled_from(["auto", "gather_sum", "two_step"]),
    scatter=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_what_pays_on_a_link_pays_on_a_slower_one(rows, ranks, itemsize, name, way, scatter):
    """Where compression saves bytes; and it pays with a faster codec and a smaller margin too."""
    codec, shape = parse_codec(name), (ranks * rows, 1024)
    ring = ring_bytes(math.prod(shape) * itemsize, ranks)
    if not scatter and received_bytes(shape, codec, ranks, choose_algorithm(shape, codec, ranks, way), 0) >= ring:
        way = "two_step"
    paying = [pays(shape, itemsize, codec, ranks, way, calibration(rate), scatter) for rate in RATES]
    assert paying == sorted(paying, reverse=True)
    for rate, paid in zip(RATES, paying):
        if paid:
            assert pays(shape, itemsize, codec, ranks, way, calibration(rate, speed=2.0), scatter)
            assert pays(shape, itemsize, codec, ranks, way, calibration(rate, margin=0.0), scatter)


def test_slow_codecs_and_fast_links_do_not_pay():
    shape, codec = (4096, 1024), parse_codec("mxfp4")
    assert pays(shape, 2, codec, 4, "auto", calibration(1e7))
    assert not pays(shape, 2, codec, 4, "auto", calibration(1e11))
    assert not pays((1, 64), 2, codec, 4, "two_step", calibration(1e7))
    assert not pays(shape, 2, parse_codec("int8:32:fp16"), 8, "gather_sum", calibration(1e7))


def test_auto_goes_by_the_calibration():
    """Equal bytes in both with two ranks, so the cheaper latency decides; over many ranks the rate does."""
    codec, shape = parse_codec("mxfp4"), (512, 1024)
    assert choose_algorithm(shape, codec, 2, "auto", calibration(1e6)) == "gather_sum"
    assert choose_algorithm(shape, codec, 8, "auto", calibration(1e6)) == "two_step"
    assert choose_algorithm(shape, codec, 8, "auto", calibration(1e12, latency=1.0)) == "gather_sum"


@pytest.mark.parametrize("scatter", [False, True])
def test_the_margin_is_what_a_prediction_must_gain(scatter):
    codec, known = parse_codec("mxfp4"), calibration(1e7)
    sums = scatter_seconds(SMALL, codec, 4, known) if scatter else sum_seconds(SMALL, codec, 4, "two_step", known)
    gain = stock_seconds(64 * 256 * 2, 4, known, scatter) / sums - 1
    assert gain > 0.05
    assert pays(SMALL, 2, codec, 4, "two_step", calibration(1e7, margin=gain - 1e-6), scatter)
    assert not pays(SMALL, 2, codec, 4, "two_step", calibration(1e7, margin=gain + 1e-6), scatter)


# Two levels.


LEVELS = {
    "inside": {"all_gather": Link(4e8, 1e-4), "all_to_all": Link(5e8, 2e-4)},
    "across": {"all_gather": Link(2e6, 5e-3), "all_to_all": Link(4e6, 6e-3)},
}
TWO_BY_TWO, THREE_BY_TWO = Islands.of_size(4, 2), Islands.of_size(6, 2)


def test_predicted_times_of_two_levels_add_up():
    """Between two islands a share is gathered, half of the tensor here; between three it takes two steps."""
    known = replace(CALIBRATION, **LEVELS)
    shape, values, message, codec = (96, 256), 96 * 256, 96 * 136, parse_codec("mxfp4")
    assert codec.message_bytes(shape) == message
    wire = 2e-4 + values / 2 * 2 / 5e8 + 5e-3 + message / 2 / 2e6 + 1e-4 + 2 * message / 2 / 4e8
    work = 3e-4 + values * (0.5e-9 + 2 * 3e-9)
    assert sum_seconds(shape, codec, 4, "hierarchical", known, TWO_BY_TWO) == pytest.approx(wire + work)
    wire = 2e-4 + values / 2 * 2 / 5e8 + 1e-4 + message / 2 / 4e8
    wire += 6e-3 + 2 * message / 6 / 4e6 + 5e-3 + 2 * message / 6 / 2e6
    work = 6e-4 + values * (0.5e-9 + 0.5 * 3e-9 + 1e-9 / 6 + 3e-9)
    assert sum_seconds(shape, codec, 6, "hierarchical", known, THREE_BY_TWO) == pytest.approx(wire + work)
    wire = 2e-4 + values / 2 * 2 / 5e8 + 6e-3 + 2 * message / 6 / 4e6
    work = 3e-4 + values / 2 * (1e-9 + 3e-9)
    assert scatter_seconds(shape, codec, 6, known, THREE_BY_TWO) == pytest.approx(wire + work)


def test_raw_values_are_as_wide_as_those_that_were_measured():
    known = replace(CALIBRATION, **LEVELS, measured={"ranks": 4, "device": "cpu", "dtype": "float32"})
    narrow = replace(CALIBRATION, **LEVELS)
    how = SMALL, parse_codec("mxfp4"), 4, "hierarchical"
    longer = sum_seconds(*how, known, TWO_BY_TWO) - sum_seconds(*how, narrow, TWO_BY_TWO)
    assert longer == pytest.approx(64 * 256 / 2 * 2 / 5e8)


def test_auto_goes_by_level_where_that_is_known_to_be_faster():
    codec, shape, pair = parse_codec("mxfp4"), (2048, 4096), parse_codec("mxfp4>mxfp8")
    known = replace(CALIBRATION, **LEVELS)
    for each, flat in ((codec, "two_step"), (pair, "two_step")):
        assert choose_algorithm(shape, each, 4, "auto", known, TWO_BY_TWO) == "hierarchical"
        assert choose_algorithm(shape, each, 4, "auto", known) == flat, "no islands"
        assert choose_algorithm(shape, each, 4, "auto", CALIBRATION, TWO_BY_TWO) == flat, "not measured"
        assert choose_algorithm(shape, each, 4, "auto", known, Islands.of_size(4, 1)) == flat, "one rank in each"
    assert choose_algorithm((1, 64), codec, 4, "auto", known, TWO_BY_TWO) == "gather_sum", "latency"
    assert choose_algorithm(shape, codec, 4, "hierarchical", CALIBRATION, TWO_BY_TWO) == "hierarchical", "asked for"
    assert choose_algorithm(shape, codec, 4, "hierarchical", known) == "two_step", "what auto chooses"
    assert choose_algorithm(shape, codec, 16, "auto", ASSUMED, Islands.of_size(16, 8)) == "hierarchical"


def test_scatters_go_by_level_among_islands_of_one_size():
    codec, shape = parse_codec("mxfp4"), (2400, 4096)
    known = replace(CALIBRATION, **LEVELS)
    assert choose_scatter(shape, codec, 4, "auto", known, TWO_BY_TWO) == "hierarchical_scatter"
    assert choose_scatter(shape, codec, 4, "hierarchical", CALIBRATION, TWO_BY_TWO) == "hierarchical_scatter"
    uneven = Islands(((0, 1), (2, 3, 4)))
    flat = [("auto", CALIBRATION, TWO_BY_TWO), ("two_step", known, TWO_BY_TWO), ("hierarchical", known, None)]
    for algorithm, its_calibration, islands in [*flat, ("hierarchical", known, uneven)]:
        assert choose_scatter(shape, codec, 4, algorithm, its_calibration, islands) == "reduce_scatter"
    with pytest.raises(ValueError, match="unknown algorithm 'ring'"):
        choose_scatter(shape, codec, 4, "ring")
