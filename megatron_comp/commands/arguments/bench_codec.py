# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp bench codec`: times of encode, decode and sum on one device."""

import argparse

from .. import options

CODECS = ("mxfp4", "mxfp8", "nvfp4", "int4:32:fp16", "int8:32:fp16", "int4:32:fp16:hadamard")


SHAPE = "1024x4096"


DESCRIPTION = "Time encode, decode and sum on one device, by codec, backend, shape and number of messages."


RENAMED = {"--ranks": "--tp", "--repeats": "--runs"}


EPILOG = """\
Example:
  megatron-comp bench codec --codec mxfp4 --shape 1024x4096 --csv codecs.csv

Before anything is timed, every backend's messages and sums are compared with the reference's, bit for bit, on the
tensors to be timed; on a difference the command fails and names the first byte that differs.

One row per measurement, in the table and in the files:
  op             encode: a tensor [rows, hidden] into a message; decode_sum: messages of all ranks into the tensor of
                 their sum; decode_sum_encode: the same, the sum encoded again by the same codec (the middle of the
                 two-step all-reduce); copy: a plain copy of the tensor, the roofline; on a GPU also empty: a kernel
                 that fills one element, the floor of any launch
  codec, backend, rows, hidden, dtype, ranks
                 what was run; ranks is the number of messages, 1 for encode and copy
  bytes_moved    each byte that must be read or written, once: tensor and message for encode, the messages and the
                 tensor for decode_sum, the messages and one more for decode_sum_encode, two tensors for copy
  median_ms, p20_ms, p80_ms
                 milliseconds per call: half of the runs took less than the median, a fifth less than p20
  gb_per_s       bytes_moved over the median, in 1e9 bytes per second
  times_copy     the median over that of the copy of the same tensor in the same run
  share_of_copy  gb_per_s over that of the copy: 1 is as fast as memory allows to move these bytes
  times_empty    on a GPU, the median over that of empty: near 1 the launch is the cost, not the work
The CSV file adds device, torch, triton, megatron_comp and date to every row.

How: a run is one measurement of every row of a shape in turn; calls rotate over buffers larger than the cache
(small tensors may stay in it). On a CPU a measurement is one call by the wall clock, Python's share included. On a GPU
it is the replay of a CUDA graph of many calls between two events.

What the figures do not show: a link, a collective or an all-reduce as a whole; on a GPU the launch of kernels from
Python, which CUDA graphs spare; a neighbour that uses the same memory or cache, as a matrix product would; the
quality of a codec, for which see `megatron-comp evaluate`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    again = "Repeat it for more"
    add("--codec", action="append", metavar="C", help=f"A codec or preset. {again} (default: {' '.join(CODECS)}).")
    add(
        "--shape",
        action="append",
        metavar="ROWSxHIDDEN",
        help=f"Shape of each rank's tensor. {again} (default {SHAPE}).",
    )
    options.add_dtype(parser, "Data type of the tensors (default bf16).", "bf16")
    add(
        "--tp",
        dest="ranks",
        action="append",
        type=int,
        metavar="N",
        help=f"Number of ranks whose messages are summed. {again} (default: 2 4; on a GPU 2 8).",
    )
    add(
        "--backend",
        action="append",
        metavar="NAME",
        help=f"A backend to time. {again} (default: all that serve the device).",
    )
    add("--device", choices=("cpu", "cuda"), help="Where to run (default: cuda where there is one).")
    add("--threads", type=int, default=1, metavar="N", help="Threads of torch on a CPU (default 1).")
    options.add_runs(parser, 20)
    add(
        "--peers",
        action="store_true",
        help="Also time what others have for mxfp4 and mxfp8 on the same buffers: encode and decode_sum of plain torch "
        "under torch.compile, and torchao's to_mx (compiled on a GPU). What does not run here gives a line, no row.",
    )
    options.add_json(parser)
    options.add_csv(parser)
    options.add_figure(parser, "each row's share of the rate of a copy")
