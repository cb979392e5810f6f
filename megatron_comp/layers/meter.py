# SPDX-License-Identifier: Apache-2.0
"""What the sums of one place sent: calls, bytes and, where that is asked for, seconds."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from .plans import Choice


@dataclass(slots=True)
class Traffic:
    """What some reductions, or gathers of logits, sent. Bytes and seconds are those of this rank."""

    calls: int = 0
    values: int = 0
    message_bytes: int = 0
    """Of the summed tensors, or gathered logits, each counted once, as they travel."""
    received_bytes: int = 0
    """From the other ranks: counted for compressed reductions, that of a ring for stock ones."""
    seconds: float | None = None
    """None unless timing was asked for."""

    @property
    def bits_per_value(self) -> float:
        return 8 * self.message_bytes / self.values if self.values else 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        timed = [each.seconds for each in (self, other) if each.seconds is not None]
        return Traffic(
            self.calls + other.calls,
            self.values + other.values,
            self.message_bytes + other.message_bytes,
            self.received_bytes + other.received_bytes,
            sum(timed) if timed else None,
        )


@dataclass(slots=True)
class SiteStats:
    """Reductions of one site of one layer: compressed ones, and uncompressed ones with the reasons."""

    layer: int | None
    site: str
    compressed: Traffic = field(default_factory=Traffic)
    kept: Traffic = field(default_factory=Traffic)
    kept_because: Counter = field(default_factory=Counter)
    algorithms: Counter = field(default_factory=Counter)
    """Of the compressed reductions: `gather_sum`, `two_step`, or `reduce_scatter`; of logits, `candidates`."""
    captured: int = 0
    """Reductions, of those above, that were recorded into a CUDA graph. Its replays run no Python and are not counted:
    where this is not 0, calls and bytes are those of warm-ups and captures alone."""

    def line(self) -> tuple[str, ...]:
        """Cells of `ModelStats.table`."""
        total = self.compressed + self.kept
        return (
            "" if self.layer is None else str(self.layer),
            self.site,
            _counts(self.algorithms) or "0",
            _counts(self.kept_because) or "0",
            f"{total.bits_per_value:.2f}",
            f"{total.received_bytes:,}",
            "" if total.seconds is None else f"{total.seconds:.3f}",
        )


@dataclass(slots=True)
class ModelStats:
    """What every compressed site of a model did since `apply_compression`, on this rank.

    `print` shows it in a line, `print(stats.table())` each site.
    """

    sites: list[SiteStats]
    link: str = ""
    """What predictions went by: the calibration file, or what is assumed of the link. Empty where nothing predicts."""
    not_recognised: list[str] = field(default_factory=list)
    """Modules of the model, with their classes, that have a sum which no policy reaches: it stays uncompressed, and is
    not counted here."""
    without_policy: list[str] = field(default_factory=list)
    """`CompressedRowParallelLinear`s to which nobody has given a policy: they sum as the stock class does, and are not
    counted here."""

    def __str__(self) -> str:
        what = "sums and gathers of logits" if any(site.site == "logits" for site in self.sites) else "sums"
        said = f"{self.compressed.calls:,} {what} compressed"
        if self.compressed.calls:
            said += f" ({_counts(self.algorithms)})"
        said += f", {self.kept.calls:,} uncompressed"
        if self.kept.calls:
            said += f" ({_counts(self.kept_because)})"
        said += f", {self.bits_per_value:.2f} bits per value, {self.received_bytes:,} bytes received"
        if self.captured:
            said += ", not counting replays of CUDA graphs"
        if self.not_recognised:
            said += f"; {len(self.not_recognised)} sums of the model are not recognised and not counted"
        if self.without_policy:
            said += f"; {len(self.without_policy)} compressed linears have no policy: uncompressed, and not counted"
        return said + (f"; {self.link}" if self.link else "")

    def table(self) -> str:
        """A line for each layer and site, for people: what it did, in how many calls, and what it received."""
        lines: list[tuple[str, ...]] = [
            ("layer", "site", "compressed", "uncompressed", "bits per value", "bytes received", "seconds")
        ]
        lines += [site.line() for site in self.sites]
        columns = []
        for heading, *cells in zip(*lines):
            width = max(map(len, (heading, *cells)))
            justify = str.ljust if heading in ("site", "compressed", "uncompressed") else str.rjust
            columns.append([justify(cell, width) for cell in (heading, *cells)])
        return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns))

    @property
    def compressed(self) -> Traffic:
        return sum((site.compressed for site in self.sites), Traffic())

    @property
    def kept(self) -> Traffic:
        return sum((site.kept for site in self.sites), Traffic())

    @property
    def kept_because(self) -> Counter:
        return sum((site.kept_because for site in self.sites), Counter())

    @property
    def algorithms(self) -> Counter:
        return sum((site.algorithms for site in self.sites), Counter())

    @property
    def captured(self) -> int:
        """Calls that were recorded into CUDA graphs. Where it is not 0, replays are missing from all figures here."""
        return sum(site.captured for site in self.sites)

    @property
    def received_bytes(self) -> int:
        return self.compressed.received_bytes + self.kept.received_bytes

    @property
    def bits_per_value(self) -> float:
        """Bits that a value of a summed tensor took on the way, over compressed and kept messages."""
        return (self.compressed + self.kept).bits_per_value


def _counts(counter: Counter) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counter.most_common())


class Meter:
    """Counts the sums of one place in `stats`.

    timing: also takes seconds, for which every sum waits for the device.
    """

    def __init__(self, layer: int | None, site: str, timing: bool = False) -> None:
        self.stats, self.timing = SiteStats(layer, site), timing

    def record(self, choice: Choice, on_gpu: bool) -> Traffic:
        """Counts one call that does what `choice` says; returns where its seconds belong."""
        stats = self.stats
        if choice.algorithm is None:
            traffic = stats.kept
            stats.kept_because[choice.reason] += 1
        else:
            traffic = stats.compressed
            stats.algorithms[choice.algorithm] += 1
        traffic.calls += 1
        traffic.values += choice.values
        traffic.message_bytes += choice.message_bytes
        traffic.received_bytes += choice.received_bytes
        if on_gpu and torch.cuda.is_current_stream_capturing():
            stats.captured += 1
        return traffic

    def clock(self, traffic: Traffic) -> AbstractContextManager:
        """Adds the seconds spent inside to `traffic`, if timing was asked for."""
        return _seconds(traffic) if self.timing and not _is_capturing() else UNTIMED


UNTIMED = nullcontext()


@contextmanager
def _seconds(traffic: Traffic) -> Iterator[None]:
    wait_for_device()
    start = time.perf_counter()
    yield
    wait_for_device()
    traffic.seconds = (traffic.seconds or 0.0) + time.perf_counter() - start


def _is_capturing() -> bool:
    """Waiting for the device is an error while a CUDA graph is captured, and would time nothing."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
