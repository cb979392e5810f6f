# SPDX-License-Identifier: Apache-2.0
"""Calibrations of a link and its codecs: from peaks, from a calibration, or of a link alone."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from ..wire.calibration import MARGIN, Calibration, Link
from ..wire.codec import Codec
from .hardware import Shares, assumed_calibration, gpu_of, links_of, wire_of


def calibration_of(args: argparse.Namespace, codecs: Sequence[Codec], ranks: int, itemsize: int) -> Calibration:
    """Of the calibration file, of a GPU's and the link's peaks, or of both: a file's codecs and latencies on a link of
    another rate. Of a link alone, codecs take no time.

    args: `calibration`, `gpu` and `wire` (the link), each of which may be None. Raises ValueError for names and rates
    that are unknown, and for a calibration of another number of ranks.
    """
    if not args.calibration:
        wire = wire_of(args.wire)
        if args.gpu is None:
            return Calibration(links_of(wire, ranks), {}, MARGIN, {"ranks": ranks}, f"{args.wire}, codecs not counted")
        return assumed_calibration(gpu_of(args.gpu), wire, Shares(), codecs, ranks, itemsize)
    known = Calibration.from_file(args.calibration)
    if known.ranks != ranks:
        raise ValueError(f"--calibration {args.calibration}: measured with {known.ranks} ranks, not {ranks}")
    return on_wire(known, args.wire) if args.wire else known


def on_wire(known: Calibration, text: str) -> Calibration:
    """The same codecs and latencies on a link of this name or rate, or of less where they were measured at less."""
    wire = wire_of(text)
    rate = wire.gb_s * 1e9 * wire.reached
    links = {name: Link(min(rate, link.bytes_per_s), link.latency_s) for name, link in known.links.items()}
    return replace(known, links=links)
