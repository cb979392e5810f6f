# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp bench collective`: what is measured of one tensor and one group, and what follows from the times."""

import hashlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from ..launcher.progress import progress
from ..wire import exchange
from ..wire.calibration import Calibration, find_calibration
from ..wire.codec import Codec, CodecPair
from ..wire.collectives import all_reduce
from ..wire.cost import choose_algorithm, choose_chunks
from ..wire.topology import Islands, Topology, connect
from ..wire.traffic import received_by_level, ring_bytes, two_step_bytes
from . import links, timing

# Renamed in torch 2.13, where the old name warns.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Entry:
    """A row to be measured: `call` gives the sum, after `ready`, which is not timed."""

    codec: str
    algorithm: str
    bytes_on_wire: int
    bytes_across: int
    call: Callable[[], torch.Tensor]
    ready: Callable[[], object] = lambda: None


def measure(setting, shape: tuple[int, int], ranks: int, group, device: torch.device) -> list[dict]:
    """The rows of one shape over the first `ranks` ranks, which are `group`. All ranks call this together."""
    x = partial_sum(dist.get_rank(), shape, setting.dtype, device)
    member = dist.get_rank() < ranks
    hosts = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    islands = Islands.of_names(hosts[:ranks])
    topology = connect({group: islands} if member else {}).get(group)
    calibration = _calibration(ranks, len(islands.members), device)
    entries = list(_entries(setting, x, islands, topology, group, calibration))
    errors = [_error(entry, ranks, group, x) if member else 0.0 for entry in entries]  # also what warms up
    seconds = []
    for _ in progress(range(setting.repeats), desc=f"{ranks} ranks, {list(shape)}", unit="round"):
        seconds.append([_seconds(entry, device) if member else _wait() for entry in entries])
    samples = zip(*links.slowest(seconds, device))
    return _rows(entries, list(samples), errors, x, ranks, len(islands.members))


def partial_sum(rank: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`[rows, hidden]` of random numbers, by which rank's they are; any rank can make them."""
    return torch.empty(shape, dtype=dtype).normal_(generator=torch.Generator().manual_seed(rank)).to(device)


def _calibration(ranks: int, hosts: int, device: torch.device) -> Calibration:
    """Those that layers would go by, the same on all ranks: what `calibrate` left for such a group, else assumed."""
    found = [find_calibration(ranks, hosts, dist.get_backend(), device.type)]
    dist.broadcast_object_list(found)
    return found[0]


def _entries(
    setting, x: torch.Tensor, islands: Islands, topology: Topology | None, group, calibration: Calibration
) -> Iterator[Entry]:
    """topology: None on ranks that do not take part."""
    ranks = islands.ranks
    summed = x.clone()  # in place, as Megatron does it

    def stock() -> torch.Tensor:
        dist.all_reduce(summed, group=group)
        return summed

    ring = ring_bytes(x.nbytes, ranks)
    yield Entry("none", "all_reduce", ring, _entries_of_a_ring(islands) * ring, stock, partial(summed.copy_, x))
    name = "fp16" if x.dtype == torch.float16 else "bf16"
    gathered = (ranks - 1) * 2 * x.numel()
    across = _entries_of_a_ring(islands) * gathered
    yield Entry(name, "gather_sum", gathered, across, partial(_gather_sum_16, x, ranks, group))
    for name, codec in setting.codecs.items():
        for algorithm in setting.algorithms:
            if isinstance(codec, CodecPair) and algorithm == "gather_sum":
                continue
            if algorithm == "hierarchical" and not islands.have_two_levels:
                continue
            chosen = choose_algorithm(x.shape, codec, ranks, algorithm, calibration, islands)
            of_bytes = exchange.chunk_bytes(x.device.type)
            chunks = choose_chunks(x.shape, codec, ranks, chosen, calibration, of_bytes, islands)
            call = partial(all_reduce, x, codec, group, chosen, chunks=chunks, topology=topology)
            yield Entry(name, chosen, *_received(x, codec, chosen, islands), call)


def _received(x: torch.Tensor, codec: Codec | CodecPair, algorithm: str, islands: Islands) -> tuple[int, int]:
    """By the busiest rank, and by the busiest machine from others, where all-gathers are rings."""
    ranks = islands.ranks
    of_ranks = [received_by_level(x.shape, codec, algorithm, islands, rank, x.itemsize) for rank in range(ranks)]
    busiest = max(map(sum, of_ranks))
    entries = _entries_of_a_ring(islands)
    if algorithm == "gather_sum":
        return busiest, entries * busiest
    if algorithm == "two_step":
        scattered, gathered = two_step_bytes(x.shape, codec, ranks)
        sent = max(len(island) * (ranks - len(island)) for island in islands.members)
        return busiest, sent * (scattered // (ranks - 1)) + entries * gathered
    return busiest, max(sum(of_ranks[rank][1] for rank in island) for island in islands.members)


def _entries_of_a_ring(islands: Islands) -> int:
    """How often a ring of all ranks, in their order, enters the machine that it enters most often."""
    if len(islands.members) == 1:
        return 0
    return max(sum((rank - 1) % islands.ranks not in island for rank in island) for island in islands.members)


def _gather_sum_16(x: torch.Tensor, ranks: int, group) -> torch.Tensor:
    """What one would write without a codec."""
    sent = x if x.itemsize == 2 else x.bfloat16()
    gathered = sent.new_empty(ranks, *x.shape)
    _all_gather_single(gathered.view(-1), sent.view(-1), group=group)
    return gathered.sum(0).to(x.dtype)


def _error(entry: Entry, ranks: int, group, x: torch.Tensor) -> float:
    """The relative root mean square of one call's error. Raises RuntimeError if ranks hold different bits."""
    entry.ready()
    result = entry.call()
    digest = hashlib.sha256(result.cpu().view(torch.uint8).numpy()).digest()
    digests = [b""] * ranks
    dist.all_gather_object(digests, digest, group=group)
    if len(set(digests)) > 1:
        raise RuntimeError(f"{entry.codec}, {entry.algorithm}: the ranks hold different sums")
    exact = torch.zeros(x.shape, device=x.device)
    for rank in range(ranks):
        exact += partial_sum(rank, x.shape, x.dtype, x.device)
    return float((result - exact).norm() / exact.norm())


def _seconds(entry: Entry, device: torch.device) -> float:
    entry.ready()
    _wait()
    start = time.perf_counter()
    entry.call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _wait() -> float:
    """For all ranks."""
    dist.barrier()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 0.0


def _rows(
    entries: list[Entry], samples: list, errors: list[float], x: torch.Tensor, ranks: int, machines: int
) -> list[dict]:
    """`samples`: seconds of all rounds, by entry; the first is the stock all-reduce."""
    rate = links.bytes_per_second()
    rows = []
    for entry, seconds, error in zip(entries, samples, errors):
        times = timing.percentiles(seconds)
        rows.append(
            {
                "codec": entry.codec,
                "algorithm": entry.algorithm,
                "ranks": ranks,
                "message_bytes": x.nbytes,
                "bytes_on_wire": entry.bytes_on_wire,
                "machines": machines,
                "bytes_across": entry.bytes_across,
                "link": links.here(),
                **times,
                "share_of_wire_limit": entry.bytes_across / rate * 1e3 / times["median_ms"] if rate else None,
                "speedup_vs_all_reduce": (rows[0]["median_ms"] if rows else times["median_ms"]) / times["median_ms"],
                "relative_error": error,
                "rows": x.shape[0],
                "hidden": x.shape[1],
                "dtype": str(x.dtype).removeprefix("torch."),
            }
        )
    return rows
