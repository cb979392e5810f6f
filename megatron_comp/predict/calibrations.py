# SPDX-License-Identifier: Apache-2.0
"""Calibrations of a link and its codecs: from peaks, from a calibration, or of a link alone."""

from collections.abc import Sequence
from dataclasses import replace

from ..wire.calibration import MARGIN, Calibration, Link
from ..wire.codec import Codec
from .hardware import Shares, assumed_calibration, gpu_of, links_of, wire_of


def calibration_of(
    file: str | None, gpu: str | None, wire: str | None, codecs: Sequence[Codec], ranks: int, itemsize: int
) -> Calibration:
    """Of the calibration file, of a GPU's and the link's peaks, or of both: a file's codecs and latencies on a link of
    another rate. Of a link alone, codecs take no time.

    file, wire: one of them is needed; wire: the link, by name or rate. Raises ValueError for names and rates that are
    unknown, and for a calibration of another number of ranks.
    """
    if file:
        known = Calibration.from_file(file)
        if known.ranks != ranks:
            raise ValueError(f"--calibration {file}: measured with {known.ranks} ranks, not {ranks}")
        return on_wire(known, wire) if wire else known
    assert wire is not None
    link = wire_of(wire)
    if gpu is None:
        return Calibration(links_of(link, ranks), {}, MARGIN, {"ranks": ranks}, f"{wire}, codecs take no time")
    return assumed_calibration(gpu_of(gpu), link, Shares(), codecs, ranks, itemsize)


def on_wire(known: Calibration, text: str) -> Calibration:
    """The same codecs and latencies on a link of this name or rate, or of less where they were measured at less."""
    wire = wire_of(text)
    rate = wire.gb_s * 1e9 * wire.reached
    links = {name: Link(min(rate, link.bytes_per_s), link.latency_s) for name, link in known.links.items()}
    return replace(known, links=links)
