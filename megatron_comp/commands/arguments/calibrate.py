# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp calibrate`: a file of what this group's link and codecs cost."""

import argparse

from .. import options

CODECS = ("mxfp4", "nvfp4", "int4:32:fp16", "int4:32:fp16:hadamard", "int5:32:fp16:hadamard", "int8:32:fp16")


DESCRIPTION = """\
Measure what sums and codecs take on this group of ranks, and keep it in a file. Later runs of such a group go by it
where a policy says `min_bytes: auto` or `algorithm: auto`.
"""


RENAMED = {"--ranks": "--tp", "--rounds": "--runs"}


EPILOG = """\
Example:
  megatron-comp calibrate --tp 2 --codec mxfp4

Each run times, in turn and from a common start, stock all-reduce and reduce-scatter, all-gather and all-to-all of
bytes, and every codec's encode and decode, at tensors of [tokens, hidden] for each --tokens; and whole compressed sums,
which the predictions are held against. A sample is the time of the slowest rank. Between the medians of collectives
times are interpolated, beyond the largest they grow by a line; a codec's line (fixed cost, cost per value) is that of
least relative error. Fixed costs include what Python takes. On several machines of several ranks also the collectives
inside machines, and across them, are timed, and hierarchical sums.

With --cuda-graphs each call is captured once, and its replays are timed: Python takes no time there, as in an engine
that captures its decode steps. That is a file of its own, by which models go whose config has a `cuda_graph_impl`.

The file holds these, and the margin that a prediction must gain before `min_bytes: auto` compresses: so much that
every whole sum that took longer than stock here would have been kept, at least 10 %; and what share of codec or wire,
whichever is shorter, sums in chunks hide, from sums of the largest size in one piece and in several. Runs of a group
like this one (ranks, machines, backend, device, network interface) find it by themselves; MEGATRON_COMP_CALIBRATION
names another file, or says `assumed`.

Columns: `auto` compresses: sizes of uncompressed messages that `min_bytes: auto` compresses; messages larger than the
largest that was measured are treated as it is. Predicted, measured and stock ms, speed-up: of the largest message, by
the algorithm that was measured faster.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    options.add_tp(parser, what="Number of ranks in the group.")
    again = "Repeat it for more"
    add(
        "--codec",
        action="append",
        default=[],
        metavar="C",
        help=f"A codec to measure. {again} (default, without --policy: {' '.join(CODECS)}). A run with another codec "
        "counts it as slow as the slowest of these.",
    )
    add(
        "--policy",
        action="append",
        default=[],
        metavar="FILE",
        help=f"A YAML policy, all codecs of which are measured, beside those of --codec. {again}.",
    )
    add(
        "--tokens",
        type=int,
        action="append",
        metavar="K",
        help=f"Rows of a tensor. {again}, at least two (default: 1 8 64 512).",
    )
    add("--hidden", type=int, default=4096, metavar="H", help="Values per row (default 4096).")
    options.add_dtype(parser, "Data type of the tensors; auto (the default) is bf16 on a GPU and fp32 on a CPU.")
    options.add_runs(parser, 9)
    add("--cuda-graphs", action="store_true", help="Time replays of CUDA graphs, in which Python takes no time.")
    add("--out", metavar="FILE", help="The file to write (default: where later runs of such a group look for it).")
    options.add_run_arguments(parser)
