# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp bench collective`: times of sums over ranks."""

import argparse

from ...wire.algorithms import ALGORITHMS
from .. import options

CODECS = ("mxfp4", "int4:32:fp16:hadamard", "int8:32:fp16")


SHAPE = "512x4096"


DESCRIPTION = "Time sums over ranks in one run: stock, in 16 bits, and compressed."


RENAMED = {"--ranks": "--tp", "--repeats": "--runs"}


EPILOG = f"""\
Example:
  megatron-comp bench collective --tp 2 --codec mxfp4 --link 100mbit

Before anything is timed, all ranks compare their sums: a collective that leaves them with different bits is an error.

One row per measurement, in the table and in the files:
  codec, algorithm
                 none, all_reduce: torch.distributed's own, what Megatron calls; bf16 or fp16, gather_sum: an all-gather
                 of the tensor in 16 bits (fp32 as bf16) and a sum, uncompressed; else megatron_comp.all_reduce
  ranks          the first so many of the ranks; the others wait
  message_bytes  of one rank's tensor, uncompressed
  bytes_on_wire  what the busiest rank receives from the others; for all_reduce, that of a ring, 2(N-1)/N of the tensor
  machines       that the ranks are on
  bytes_across   what the busiest machine's ranks receive from other machines, where all-reduces and all-gathers are
                 rings in rank order, as those of gloo are
  link           rate of each machine's link in each direction, and after @ the latency of a round trip
  median_ms, p20_ms, p80_ms
                 milliseconds per call, from a barrier to the last rank's end; half of the calls take less than the
                 median
  share_of_wire_limit
                 the time that bytes_across alone take at the link's rate, over the median; empty where the rate is not
                 known. Headers of packets take 4 to 5 % of a rate; a first burst of some 256 KB goes for nothing
  speedup_vs_all_reduce
                 the median of none, all_reduce with the same ranks and tensor, over this one
  relative_error of the sum: root of the mean square of what differs from the fp32 sum in rank order, over that sum's
The CSV file adds rows, hidden and dtype of the tensor, device, torch, triton, megatron_comp and date.

How: a run is one call of every row in turn, after a call of each that is not counted.

{options.LINKS}
What the figures do not show: computation that runs meanwhile, and latency, which matters for small messages. Errors are
those of normally distributed values: for what a codec does to a model, see `megatron-comp evaluate`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    again = "Repeat it for more"
    add(
        "--tp",
        dest="ranks",
        action="append",
        type=int,
        metavar="N",
        help=f"Number of ranks to sum over. {again} (default: all joined, or 2).",
    )
    options.add_links(parser)
    add("--codec", action="append", metavar="C", help=f"A codec or preset. {again} (default: {' '.join(CODECS)}).")
    add(
        "--algorithm",
        action="append",
        choices=ALGORITHMS,
        help=f"How codecs are summed. {again} (default: gather_sum two_step, and hierarchical where machines have "
        "several ranks). Two codecs joined by '>' have no gather_sum.",
    )
    add(
        "--shape",
        action="append",
        metavar="ROWSxHIDDEN",
        help=f"Shape of each rank's tensor. {again} (default {SHAPE}).",
    )
    options.add_dtype(parser, "Data type of the tensors (default bf16).", "bf16")
    options.add_runs(parser, 15)
    options.add_timeout(parser)
    options.add_json(parser)
    options.add_csv(parser)
    options.add_figure(parser, "the times")
