# SPDX-License-Identifier: Apache-2.0
"""How long calls take: on a CPU by the wall clock, on a GPU by events around the replays of a CUDA graph.

Both clocks `prepare` each call once and then measure `round` after round, all calls in turn, so that a slow moment of
the machine hits all alike. A call takes the number of the buffers that it works on, which rotate.
"""

import itertools
import time
from collections.abc import Callable

import torch

Call = Callable[[int], None]

# What a CPU's rotating buffers of one role add up to: more than its last-level cache holds.
CPU_FOOTPRINT = 128 << 20
# A GPU's: so many times its L2 cache. What a call reads and writes is at least half a tensor.
L2_FOOTPRINT = 4
# Tensors that a CUDA graph works through: at 5 TB/s it runs for 0.2 ms, and the start of a graph takes microseconds.
GRAPH_FOOTPRINT = 1 << 30
# No more buffers than this, nor calls in a graph: tensors under some 64 KB stay in the cache.
MOST = 4096


def clock_for(device: torch.device, tensor_bytes: int) -> "WallClock | GraphClock":
    """The clock of a device, for tensors of this size."""
    if device.type == "cpu":
        return WallClock(_count(CPU_FOOTPRINT, tensor_bytes))
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    buffers = _count(L2_FOOTPRINT * l2_bytes, tensor_bytes)
    return GraphClock(buffers, max(buffers, _count(GRAPH_FOOTPRINT, tensor_bytes)))


def _count(footprint: int, tensor_bytes: int) -> int:
    return min(max(2, -(-footprint // tensor_bytes)), MOST)


class WallClock:
    """Times one call at a time; what Python and torch do around the work is in the time."""

    def __init__(self, buffers: int) -> None:
        self.buffers = buffers
        # Every call takes the next buffers, whoever was before it: nobody finds in the cache what another has left.
        self._turns = itertools.cycle(range(buffers))

    def prepare(self, call: Call) -> Call:
        call(next(self._turns))  # compiles, and fills caches of tables
        return call

    def round(self, prepared: list[Call]) -> list[float]:
        """Seconds a call."""
        return [self._seconds(call) for call in prepared]

    def _seconds(self, call: Call) -> float:
        turn = next(self._turns)
        start = time.perf_counter()
        call(turn)
        return time.perf_counter() - start


class GraphClock:
    """Times `calls` calls at a time, captured into one CUDA graph: neither Python nor kernel launches are in the time.

    Needs calls that a CUDA graph can hold, as inference needs them: without host synchronization.
    """

    def __init__(self, buffers: int, calls: int) -> None:
        self.buffers = buffers
        self.calls = calls
        self._pool = torch.cuda.graph_pool_handle()  # one for all: graphs run one by one and keep nothing in it

    def prepare(self, call: Call) -> torch.cuda.CUDAGraph:
        graph = capture(call, [turn % self.buffers for turn in range(self.calls)], self._pool)
        graph.replay()  # the first replay also uploads it
        return graph

    def round(self, prepared: list[torch.cuda.CUDAGraph]) -> list[float]:
        """Seconds a call."""
        events = []
        prepared[0].replay()  # not timed: from here on the device is busy while the host launches what is
        for graph in prepared:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 / self.calls for begin, end in events]


def capture(call: Call, turns: list[int], pool: tuple[int, int] | None = None) -> torch.cuda.CUDAGraph:
    """A graph of `call(turn)` for each turn, one after another. Warmed up before on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for turn in turns[:3]:
            call(turn)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for turn in turns:
            call(turn)
    return graph


def percentiles(seconds: list[float]) -> dict[str, float]:
    """`median_ms`, `p20_ms` and `p80_ms`, interpolated linearly."""
    shares = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    found = torch.tensor(seconds, dtype=torch.float64).quantile(shares) * 1e3
    return dict(zip(("median_ms", "p20_ms", "p80_ms"), found.tolist()))


def speedup(baseline: list[float], seconds: list[float]) -> tuple[float, float, float]:
    """How many times as fast as the baseline: by the medians, and from where to where with 95 % confidence.

    Both lists are of the same turns, in which the two ran one after the other: turns are drawn again (bootstrap), so
    that what made a whole turn slow counts for neither. Of fewer than some ten turns the interval is too narrow.
    """
    samples = torch.tensor([baseline, seconds], dtype=torch.float64)
    draws = torch.randint(len(seconds), (2000, len(seconds)), generator=torch.Generator().manual_seed(0))
    baselines, medians = samples[:, draws].quantile(0.5, dim=-1)
    low, high = (baselines / medians).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    baseline_median, median = samples.quantile(0.5, dim=-1).tolist()
    return baseline_median / median, low, high
