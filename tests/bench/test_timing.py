# SPDX-License-Identifier: Apache-2.0
"""How benches count time, on clocks that the test holds."""

from types import SimpleNamespace

import pytest
import torch

from megatron_comp.bench import codecs, timing

CPU = torch.device("cpu")


class FakeTime:
    """Seconds that pass only when work is done."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


def test_the_wall_clock(monkeypatch):
    fake, calls = FakeTime(), []
    monkeypatch.setattr(timing, "time", fake)

    def work(name, seconds):
        def call(turn):
            calls.append((name, turn))
            fake.now += seconds

        return call

    clock = timing.WallClock(buffers=3)
    prepared = [clock.prepare(work("a", 0.25)), clock.prepare(work("b", 2.0))]
    rounds = [clock.round(prepared) for _ in range(2)]
    assert rounds == [[0.25, 2.0]] * 2
    # All in turn, and nobody on the buffers of whoever was just before.
    assert calls == list(zip("ababab", (0, 1, 2, 0, 1, 2)))


def test_the_graph_clock(monkeypatch):
    """Events on a device that works off what is queued; the host counts for nothing, nor does the first replay."""
    device = FakeTime()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = device.now

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    class Graph:
        def __init__(self, seconds):
            self.seconds, self.replays = seconds, 0

        def replay(self):
            self.replays += 1
            device.now += self.seconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    clock, graphs = timing.GraphClock(buffers=2, calls=8), [Graph(1.0), Graph(4.0)]
    assert clock.round(graphs) == [0.125, 0.5]
    assert [graph.replays for graph in graphs] == [2, 1]


def test_buffers_exceed_the_cache(monkeypatch):
    megabytes = 1 << 20
    assert timing.clock_for(CPU, 8 * megabytes).buffers * 8 >= 128
    assert timing.clock_for(CPU, 1000 * megabytes).buffers == 2
    properties = SimpleNamespace(L2_cache_size=50 * megabytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    for tensor_bytes in (64 << 10, 8 * megabytes, 256 * megabytes):
        clock = timing.clock_for(torch.device("cuda"), tensor_bytes)
        # The sum of 2 messages of 4 bits and their re-encoding touch 3/4 of a bf16 tensor.
        assert clock.buffers * tensor_bytes * 3 / 4 > 2 * 50 * megabytes
        assert clock.calls >= clock.buffers


def test_percentiles():
    seconds = [value / 1e3 for value in (50, 10, 30, 20, 40, 60)]
    assert timing.percentiles(seconds) == pytest.approx({"median_ms": 35, "p20_ms": 20, "p80_ms": 50})


def test_what_is_derived_from_times():
    def entry(op, bytes_moved):
        return codecs.Entry(op, "mxfp4", "reference", 1, bytes_moved, call=None)

    setting = SimpleNamespace(dtype="bf16")
    entries = [entry("copy", 8_000_000), entry("empty", 0), entry("encode", 5_000_000)]
    copy, _, encode = codecs._rows(entries, [(0.002, 0.002), (0.0005,) * 2, (0.004, 0.006)], (4, 64), setting)
    assert copy["gb_per_s"] == pytest.approx(4) and copy["times_copy"] == copy["share_of_copy"] == 1
    assert encode["median_ms"] == pytest.approx(5)
    assert encode["gb_per_s"] == pytest.approx(1)
    assert encode["times_copy"] == pytest.approx(2.5)
    assert encode["share_of_copy"] == pytest.approx(0.25)
    assert encode["times_empty"] == pytest.approx(10)
    copy, encode = codecs._rows([entries[0], entries[2]], [(0.002,), (0.004,)], (4, 64), setting)
    assert copy["times_empty"] is encode["times_empty"] is None


def test_speedup_of_turns():
    """By medians; what a whole turn was slow by is in neither; few draws decide where noise is large."""
    slow = [1.0, 5.0, 2.0, 1.0, 3.0, 1.0, 8.0, 2.0]
    assert timing.speedup(slow, [each / 2 for each in slow]) == pytest.approx((2.0, 2.0, 2.0))
    assert timing.speedup([3.0], [2.0]) == pytest.approx((1.5, 1.5, 1.5))
    generator = torch.Generator().manual_seed(1)
    base, other = (1 + 0.1 * torch.randn(400, generator=generator).double() for _ in range(2))
    faster, low, high = timing.speedup(base.tolist(), other.tolist())
    # The median of 400 normal samples scatters by 1.25 * 0.1 / 20, the ratio of two by sqrt(2) more: 0.0089.
    assert low < 1 < high and low < faster < high and 2 < (high - low) / 0.0089 < 6
    few = timing.speedup(base[:16].tolist(), other[:16].tolist())
    assert few[2] - few[1] > 2 * (high - low)


def test_the_interval_is_as_wide_as_95_percent_are():
    """2 * 1.96 standard errors of the ratio of two medians, 0.0089 each; 80 % would be 2.56, 99 % 5.15."""
    widths = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        base, other = (1 + 0.1 * torch.randn(400, generator=generator).double() for _ in range(2))
        _, low, high = timing.speedup(base.tolist(), other.tolist())
        widths.append((high - low) / 0.0089)
    assert sum(widths) / len(widths) == pytest.approx(3.92, rel=0.12)
