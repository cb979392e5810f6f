# SPDX-License-Identifier: Apache-2.0
"""From times to a calibration: links as measured, a line through each codec's medians, and a margin for what the
sum of these gets wrong."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..wire import exchange
from ..wire.calibration import LEVEL_LINKS, LINKS, MARGIN, Calibration, CodecCost, Link
from ..wire.codec import Codec
from ..wire.cost import pays, stock_seconds, sum_seconds, wire_and_work
from ..wire.topology import Islands
from ..wire.traffic import ring_bytes
from .calibration import CHUNKS, Scope, Timings

# Where the search for the size that pays ends; also a prefill of 16k tokens of an 8k-wide model stays below.
LARGEST_BYTES = 256 << 20


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(fixed, slope), neither negative, with the least squares of relative errors over (size, seconds)."""
    a = sum(1 / t**2 for _, t in points)
    b = sum(x / t**2 for x, t in points)
    c = sum(x * x / t**2 for x, t in points)
    d, e = sum(1 / t for _, t in points), sum(x / t for x, t in points)
    if determinant := a * c - b * b:
        fixed, slope = (d * c - b * e) / determinant, (a * e - b * d) / determinant
        if fixed >= 0 and slope >= 0:
            return fixed, slope
    through_zero, flat = (0.0, e / c), (d / a, 0.0)
    return min(through_zero, flat, key=lambda found: sum(((found[0] + found[1] * x) / t - 1) ** 2 for x, t in points))


def line_to_largest(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The same, but through the last point, of the largest size.

    For what is longer than the largest size: that goes by its rate, and small sizes say what a call costs.
    """
    largest, longest = points[-1]
    # Of fixed * (1 - x / largest) + longest * x / largest, held against t.
    weights = [(1 - x / largest) / t for x, t in points]
    misses = [1 - longest * x / largest / t for x, t in points]
    fixed = sum(w * m for w, m in zip(weights, misses)) / sum(w * w for w in weights)
    fixed = min(max(fixed, 0.0), longest)
    return fixed, (longest - fixed) / largest


def calibration(setting: Scope, timings: Timings, about: Mapping[str, object]) -> Calibration:
    ranks, links = about["ranks"], {}
    for name in LINKS:
        # By size, since very small shapes send messages of one and the same least size.
        taken = {_received(setting, name, shape, ranks): timings.median(name, shape) for shape in setting.shapes}
        links[name] = _link(taken)
    levels: dict[str, dict[str, Link]] = {"inside": {}, "across": {}}
    if islands := setting.islands:
        sizes = {"inside": max(map(len, islands.members)), "across": len(islands.members)}
        for level, name in itertools.product(levels, LEVEL_LINKS):
            levels[level][name] = _link(
                {
                    _received_in_level(setting, name, shape, sizes[level]): timings.median(f"{level} {name}", shape)
                    for shape in setting.shapes
                }
            )
    codecs = {}
    for name, codec in setting.codecs.items():
        parts = []
        for operation, messages in (("encode", 1), ("decode", ranks)):
            parts += line([(s[0] * s[1] * messages, timings.median(operation, s, name)) for s in setting.shapes])
        codecs[str(codec)] = CodecCost(*parts)
    unproven = Calibration(links, codecs, 0.0, about, "just measured", **levels)
    unproven = replace(unproven, hidden=_hidden(setting, timings, unproven))
    margin = max(MARGIN, *(_lost(setting, timings, unproven, shape) for shape in setting.shapes))
    return replace(unproven, margin=margin)


def _link(taken: Mapping[float, float]) -> Link:
    """taken: seconds by bytes."""
    points = sorted((float(size), seconds) for size, seconds in taken.items())
    latency, per_byte = line_to_largest(points)
    # A link whose time does not grow with size still has some rate: it took no more than a tenth of the largest.
    return Link(1 / max(per_byte, 0.1 * points[-1][1] / points[-1][0]), latency, tuple(points))


def _received_in_level(setting: Scope, name: str, shape: tuple[int, int], ranks: int) -> float:
    count = setting.message_bytes(shape)
    return (ranks - 1) * (count if name == "all_gather" else count // ranks)


def _received(setting: Scope, name: str, shape: tuple[int, int], ranks: int) -> float:
    if name in ("all_reduce", "reduce_scatter"):
        return ring_bytes(setting.nbytes(shape), ranks, 2 if name == "all_reduce" else 1)
    count = -(-setting.message_bytes(shape) // ranks) * ranks
    return (ranks - 1) * (count if name == "all_gather" else count / ranks)


def _hidden(setting: Scope, timings: Timings, unproven: Calibration) -> float:
    """What chunks saved of the shorter of codec and wire, as a share of what they could hide: over all codecs and both
    algorithms, of the largest size. 1 where that has too few rows to be cut."""
    saved = could = 0.0
    shape, ranks = setting.shapes[-1], unproven.ranks
    for name, codec in setting.codecs.items():
        for way in setting.ways:
            slices = ranks if way != "hierarchical" else setting.islands.shares * len(setting.islands.members)
            count = len(exchange.chunk_rows(shape[0], slices, CHUNKS))
            whole, cut = (timings.median("pieces", shape, name, way, chunks) for chunks in (1, CHUNKS))
            how = shape, codec, ranks, way, unproven
            (_, work), (wire, longer) = (wire_and_work(*how, pieces, setting.islands) for pieces in (1, count))
            saved += whole - cut + longer - work
            could += min(wire, longer) * (1 - 1 / count)
    return min(max(saved / could, 0.0), 1.0) if could else 1.0


def _lost(setting: Scope, timings: Timings, unproven: Calibration, shape: tuple[int, int]) -> float:
    """What the predictions promised to gain, as a share, for the sums of a shape that took longer than stock."""
    ranks, worst = unproven.ranks, 0.0
    predicted_stock = stock_seconds(setting.nbytes(shape), ranks, unproven)
    for name, codec in setting.codecs.items():
        for way in setting.ways:
            if timings.median("sum", shape, name, way) > timings.median("all_reduce", shape):
                predicted = sum_seconds(shape, codec, ranks, way, unproven, setting.islands)
                worst = max(worst, predicted_stock / predicted - 1)
    return worst


def compressed_sizes(
    codec: Codec, itemsize: int, known: Calibration, hidden: int = 4096, islands: Islands | None = None
) -> list[tuple[int, int | None]]:
    """Sizes that `min_bytes: auto` compresses: (first, last) bytes of uncompressed messages, each range ascending.

    None as the last: all larger ones too. Sizes go by rows of `hidden` values, and are looked at at powers of two; a
    range that begins and ends between two of these is not seen.
    """

    def compressed(rows: int) -> bool:
        return pays((rows, hidden), itemsize, codec, known.ranks, "auto", known, islands=islands)

    def turn(low: int, high: int) -> int:
        """The first rows in (low, high] that are treated as `high` is; `low` is treated otherwise."""
        wanted = compressed(high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if compressed(middle) == wanted else (middle, high)
        return high

    ranges, start, before = [], None, 0
    for rows in (2**power for power in range(max(1, LARGEST_BYTES // (hidden * itemsize)).bit_length())):
        if compressed(rows) and start is None:
            start = turn(before, rows) if before else rows
        elif start is not None and not compressed(rows):
            ranges.append((start, turn(before, rows) - 1))
            start = None
        before = rows
    if start is not None:
        ranges.append((start, None))
    row = hidden * itemsize
    return [(first * row, last and last * row) for first, last in ranges]
