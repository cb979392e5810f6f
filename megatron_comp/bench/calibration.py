# SPDX-License-Identifier: Apache-2.0
"""Times of a group's collectives and codecs, all of them in turn, each sample that of the slowest rank."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from ..launcher.progress import progress
from ..wire.calibration import LEVEL_LINKS
from ..wire.codec import Codec
from ..wire.collectives import all_reduce
from ..wire.cost import FLAT
from ..wire.topology import Islands, Topology

# Tensors below this are over in microseconds and noisy: they are timed so many times a round.
SMALL_BYTES = 256 * 1024
SMALL_SAMPLES = 5
# Of the largest tensor, beside sums as they are run: in one piece and in so many, which shows what chunks hide.
CHUNKS = 4


@dataclass(frozen=True)
class Scope:
    """What is timed. shapes: `(tokens, hidden)`, ascending. topology: of the ranks, where they are in two levels.

    graphs: replays of CUDA graphs, one for each call, are timed.
    """

    codecs: dict[str, Codec]
    shapes: list[tuple[int, int]]
    dtype: str
    rounds: int
    topology: Topology | None = None
    graphs: bool = False

    @property
    def ways(self) -> tuple[str, ...]:
        """The algorithms of whole sums."""
        return FLAT if self.topology is None else (*FLAT, "hierarchical")

    @property
    def islands(self) -> Islands | None:
        return self.topology and self.topology.islands

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    def nbytes(self, shape: tuple[int, int]) -> int:
        return shape[0] * shape[1] * self.itemsize

    def message_bytes(self, shape: tuple[int, int]) -> int:
        """Of the messages that all-gather and all-to-all are timed with: about those of 4 bits, if values have 16."""
        return max(256, self.nbytes(shape) // 4)


class Timings:
    """Seconds by what was timed: (operation, shape[, codec[, algorithm[, chunks]]])."""

    def __init__(self, samples: dict[tuple, list[float]]) -> None:
        self.samples = samples

    def median(self, *what) -> float:
        return median(self.samples[what])


def measure(setting: Scope, device: torch.device) -> Timings:
    """Every rank's own times, and then of each sample the largest over the ranks: equal on all of them."""
    calls = {}
    for shape in setting.shapes:
        calls |= _calls(setting, shape, device)
    samples: dict[tuple, list[float]] = {what: [] for what in calls}
    steps = [step for step in calls for _ in range(SMALL_SAMPLES if setting.nbytes(step[1]) < SMALL_BYTES else 1)]
    for call in calls.values():
        call()  # compiles, connects, fills caches
    if setting.graphs:
        pool = torch.cuda.graph_pool_handle()
        calls = {what: _captured(call, pool) for what, call in calls.items()}
    bar = progress(total=setting.rounds * len(steps), desc="calibrate", unit="call")
    with bar:
        for _ in range(setting.rounds):
            for what in steps:
                samples[what].append(_seconds(calls[what], device))
                bar.update()
    flat = torch.tensor([each for what in calls for each in samples[what]], dtype=torch.float64, device=device)
    dist.all_reduce(flat, op=dist.ReduceOp.MAX)
    slowest = iter(flat.tolist())
    return Timings({what: [next(slowest) for _ in samples[what]] for what in calls})


def _calls(setting: Scope, shape: tuple[int, int], device: torch.device) -> dict[tuple, Callable[[], object]]:
    """What is timed at one size. A stock all-reduce works in place, here on zeros, which stay what they are."""
    ranks = dist.get_world_size()
    x = torch.randn(shape, device=device).to(getattr(torch, setting.dtype))
    zeros = torch.zeros(-(-x.numel() // ranks) * ranks, dtype=x.dtype, device=device)
    share = zeros.new_empty(zeros.numel() // ranks)
    count = -(-setting.message_bytes(shape) // ranks) * ranks
    sent, received = (torch.zeros(size, dtype=torch.uint8, device=device) for size in (count, count * ranks))
    scattered = sent.new_empty(count)
    calls: dict[tuple, Callable[[], object]] = {
        ("all_reduce", shape): lambda: dist.all_reduce(zeros[: x.numel()]),
        ("reduce_scatter", shape): lambda: _reduce_scatter(share, zeros),
        ("all_gather", shape): lambda: _all_gather(received, sent),
        ("all_to_all", shape): lambda: dist.all_to_all_single(scattered, sent),
    }
    for name, codec in setting.codecs.items():
        messages = codec.encode(x).expand(ranks, -1).contiguous()
        calls["encode", shape, name] = lambda codec=codec: codec.encode(x)
        calls["decode", shape, name] = lambda codec=codec, messages=messages: codec.decode_sum(messages, shape, x.dtype)
        for way in setting.ways:
            how = {"algorithm": way, "topology": setting.topology}
            calls["sum", shape, name, way] = lambda codec=codec, how=how: all_reduce(x, codec, **how)
            for chunks in (1, CHUNKS) if shape == setting.shapes[-1] else ():
                calls["pieces", shape, name, way, chunks] = lambda codec=codec, how=how, chunks=chunks: all_reduce(
                    x, codec, chunks=chunks, **how
                )
    if setting.topology is not None:
        calls |= _level_calls(setting.topology, shape, sent[: setting.message_bytes(shape)])
    return calls


def _captured(call: Callable[[], object], pool: object) -> Callable[[], object]:
    """The kernels and collectives of a call, without its Python. Graphs that are not replayed at once share a pool."""
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog may ask for events meanwhile, in a thread of its own.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        call()
    return graph.replay


def _level_calls(topology: Topology, shape: tuple[int, int], sent: torch.Tensor) -> dict[tuple, Callable[[], object]]:
    """The collectives of both levels, all sub-groups of a level at once; nothing on ranks without a share."""
    calls: dict[tuple, Callable[[], object]] = {}
    for level, group in (("inside", topology.inside), ("across", topology.across)):
        if group is None:
            calls |= {(f"{level} {name}", shape): lambda: None for name in LEVEL_LINKS}
            continue
        ranks = group.size()
        received, scattered = sent.new_empty(ranks * sent.numel()), sent.new_empty(sent.numel() // ranks * ranks)
        calls[f"{level} all_gather", shape] = lambda r=received, g=group: _all_gather(r, sent, group=g)
        calls[f"{level} all_to_all", shape] = lambda s=scattered, g=group: dist.all_to_all_single(
            s, sent[: s.numel()], group=g
        )
    return calls


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    dist.barrier()
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# Renamed in torch 2.13, where the old names warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
