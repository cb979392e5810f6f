# SPDX-License-Identifier: Apache-2.0
"""The rows of `megatron-comp bench codec`: what is measured on one shape, and what follows from the times."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from tqdm import tqdm

from ..wire.codec import Codec
from . import equality, peers, timing
from .circumstances import DTYPES


@dataclass(frozen=True)
class CodecTiming:
    """What is run, checked."""

    codecs: dict[str, Codec]
    shapes: list[tuple[int, int]]
    dtype: str
    ranks: list[int]
    backends: dict[str, ModuleType]
    device: torch.device
    repeats: int
    peers: dict[str, object]


@dataclass(frozen=True)
class Entry:
    """A row to be measured. `call(i)` works on the i-th buffers; `check()` raises if it does wrong."""

    op: str
    codec: str
    backend: str
    ranks: int
    bytes_moved: int
    call: timing.Call
    check: Callable[[], None] = lambda: None


def measure(setting: CodecTiming, shape: tuple[int, int]) -> list[dict]:
    """The rows of one shape. Raises equality.WrongBytes before anything is timed if a backend is wrong."""
    torch.compiler.reset()  # peers compile shapes in, and torch keeps only a few versions of a function
    partials = _partials(setting, shape)
    clock = timing.clock_for(setting.device, partials[0].nbytes)
    entries, prepared = [], []
    wanted = _entries(setting, partials, clock.buffers)
    for entry in tqdm(wanted, desc="check", unit=" rows", disable=None, leave=False):
        try:
            entry.check()
            prepared.append(clock.prepare(entry.call))
        except Exception as error:
            if entry.backend not in setting.peers:
                raise
            peers.no_row(f"{entry.backend}, {entry.op} {entry.codec}", error)
        else:
            entries.append(entry)
    repeats = tqdm(range(setting.repeats), desc="time", unit="round", disable=None, leave=False)
    samples = zip(*[clock.round(prepared) for _ in repeats])
    return _rows(entries, list(samples), shape, setting)


def _entries(setting: CodecTiming, partials: torch.Tensor, buffers: int) -> Iterator[Entry]:
    """All that is to be checked and measured on the partial sums `[ranks, rows, hidden]`, the copy first."""
    # Outputs start as copies too: memory that nobody has written yet costs a page fault at the first write.
    x, y = (_rotation(partials, buffers, setting.device) for _ in range(2))
    yield Entry("copy", "none", "torch", 1, 2 * x[0].nbytes, lambda i: y[i].copy_(x[i]))
    if setting.device.type == "cuda":
        one = torch.zeros(1, device=setting.device)
        yield Entry("empty", "none", "torch", 1, 0, lambda _: one.fill_(1.0))

    for name, codec in setting.codecs.items():
        truth = equality.Truth.of(codec, partials)
        messages = _rotation(truth.messages[None], buffers, setting.device)
        sent = _rotation(truth.messages, buffers, setting.device)
        peers_of_it = setting.peers if codec.format in peers.MX_FORMATS else {}
        for backend_name, backend in (setting.backends | peers_of_it).items():
            for op, ranks in equality.operations(backend, setting.ranks):
                given = x if op == "encode" else [message[:ranks] for message in messages]
                out = y if op == "decode_sum" else sent
                yield Entry(
                    *(op, name, backend_name, ranks, given[0].nbytes + out[0].nbytes),
                    call=partial(_call, backend, op, codec, given, partials.shape[1:], out),
                    check=partial(equality.check, backend_name, backend, op, ranks, truth, setting.device),
                )


def _partials(setting: CodecTiming, shape: tuple[int, int]) -> torch.Tensor:
    """`[ranks, rows, hidden]` of random numbers, where the reference is to encode them."""
    large = shape[0] * shape[1] > equality.CPU_ORACLE_VALUES
    home = setting.device if large else torch.device("cpu")
    # At least two, so that the check has another tensor to change to.
    partials = torch.empty((max(2, *setting.ranks), *shape), dtype=DTYPES[setting.dtype], device=home)
    return partials.normal_(generator=torch.Generator(home).manual_seed(0))


def _rotation(tensors: torch.Tensor, buffers: int, device: torch.device) -> list[torch.Tensor]:
    """So many tensors, each with memory of its own: copies of those along the first dimension, in turn."""
    tensors = tensors.to(device)
    return [tensors[turn % len(tensors)].clone() for turn in range(buffers)]


def _call(backend, op: str, codec: Codec, given: list, shape: tuple[int, int], out: list, turn: int) -> None:
    equality.apply(backend, op, codec.format, given[turn], shape, out[turn])


def _rows(entries: list[Entry], samples: list[tuple[float, ...]], shape: tuple[int, int], setting: CodecTiming) -> list:
    """`samples`: seconds of all rounds, by entry. Among the entries are one copy and, on a GPU, one empty."""
    rows = []
    for entry, seconds in zip(entries, samples):
        times = timing.percentiles(seconds)
        rows.append(
            {
                "op": entry.op,
                "codec": entry.codec,
                "backend": entry.backend,
                "rows": shape[0],
                "hidden": shape[1],
                "dtype": setting.dtype,
                "ranks": entry.ranks,
                "bytes_moved": entry.bytes_moved,
                **times,
                "gb_per_s": entry.bytes_moved / times["median_ms"] / 1e6,
            }
        )
    by_op = {row["op"]: row for row in rows}
    copy, empty = by_op["copy"], by_op.get("empty")
    for row in rows:
        row["times_copy"] = row["median_ms"] / copy["median_ms"]
        row["share_of_copy"] = row["gb_per_s"] / copy["gb_per_s"]
        row["times_empty"] = row["median_ms"] / empty["median_ms"] if empty else None
    return rows
