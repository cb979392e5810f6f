# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp bench collective`: times of sums over ranks."""

import argparse
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ..bench import links, plot, sums
from ..bench.circumstances import circumstances
from ..launcher import output
from ..wire.codec import Codec, CodecPair, parse_codec
from ..wire.cost import ALGORITHMS
from . import options

CODECS = ("mxfp4", "int4:32:fp16:hadamard", "int8:32:fp16")
SHAPE = "512x4096"

COLUMNS = {
    "codec": ("codec", ""),
    "algorithm": ("algorithm", ""),
    "ranks": ("ranks", "d"),
    "message_bytes": ("tensor bytes", ",d"),
    "bytes_on_wire": ("bytes on wire", ",d"),
    "machines": ("machines", "d"),
    "bytes_across": ("bytes across", ",d"),
    "link": ("link", ""),
    "median_ms": ("median ms", ".2f"),
    "p20_ms": ("p20", ".2f"),
    "p80_ms": ("p80", ".2f"),
    "share_of_wire_limit": ("of wire limit", ".1%"),
    "speedup_vs_all_reduce": ("x all-reduce", ".2f"),
    "relative_error": ("error", ".5f"),
}

DESCRIPTION = "Time sums over ranks in one run: stock, in 16 bits, and compressed."
RENAMED = {"--ranks": "--tp", "--repeats": "--runs"}
EPILOG = f"""\
Example:
  megatron-comp bench collective --tp 2 --codec mxfp4 --link 100mbit

Before anything is timed, all ranks compare their sums: a collective that leaves them with different bits is an error.

One row a measurement, in the table and in the files:
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
                 milliseconds a call, from a barrier to the last rank's end; half of the calls took less than the median
  share_of_wire_limit
                 the time that bytes_across alone take at the link's rate, over the median; empty where the rate is not
                 known. Headers of packets take 4 to 5 % of a rate; a first burst of some 256 KB goes for nothing
  speedup_vs_all_reduce
                 the median of none, all_reduce with the same ranks and tensor, over this one
  relative_error of the sum: root of the mean square of what differs from the fp32 sum in rank order, over that sum's
The CSV file adds rows, hidden and dtype of the tensor, device, torch, triton, megatron_comp and date.

How: a round is one call of every row in turn, after a call of each that is not counted.

{links.EPILOG}
What the figures do not show: computation that runs meanwhile, and latency, which matters for small messages. Errors are
those of normally distributed values: for what a codec does to a model, see `megatron-comp evaluate`.
"""


@dataclass(frozen=True)
class SumTiming:
    """What is run, checked."""

    codecs: dict[str, Codec | CodecPair]
    algorithms: list[str]
    ranks: list[int]
    shapes: list[tuple[int, int]]
    dtype: torch.dtype
    repeats: int


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
    links.add_argument(parser)
    add("--codec", action="append", metavar="C", help=f"A codec or preset. {again} (default: {' '.join(CODECS)}).")
    add(
        "--algorithm",
        action="append",
        choices=ALGORITHMS,
        help=f"How codecs are summed. {again} (default: gather_sum two_step, and hierarchical where machines have "
        "several ranks). Two codecs joined by '>' have no gather_sum.",
    )
    add("--shape", action="append", metavar="ROWSxHIDDEN", help=f"Of a rank's tensor. {again} (default {SHAPE}).")
    options.add_dtype(parser, "Of the tensors (default bf16).", "bf16")
    options.add_runs(parser, 15)
    options.add_timeout(parser)
    options.add_json(parser)
    options.add_csv(parser)
    options.add_figure(parser, "the times")


def check(args: argparse.Namespace) -> SumTiming:
    links.check(args)
    options.check_written(args)
    options.at_least_one(args, "runs")
    options.check_timeout(args)
    world = int(os.environ.get("WORLD_SIZE", 0))
    counts = sorted(set(args.ranks or [world or 2]))
    if counts[0] < 2 or world and counts[-1] > world:
        wrong = counts[0] if counts[0] < 2 else counts[-1]
        raise ValueError(f"--tp {wrong}: allowed are 2 {f'to {world}, which were started' if world else 'and more'}")
    names = [name for name in args.codec or CODECS if name != "none"]  # its row is there anyway
    algorithms = list(dict.fromkeys(args.algorithm or ALGORITHMS[1:]))
    codecs = {name: parse_codec(name) for name in names}
    if algorithms == ["gather_sum"] and (pairs := [name for name in names if isinstance(codecs[name], CodecPair)]):
        raise ValueError(f"--codec {pairs[0]}: gather_sum has one phase and takes one codec")
    return SumTiming(
        codecs=codecs,
        algorithms=algorithms,
        ranks=counts,
        shapes=[options.shape(text, SHAPE) for text in args.shape or [SHAPE]],
        dtype=getattr(torch, options.dtype_name(args)),
        repeats=args.runs,
    )


def start(args: argparse.Namespace, argv: list[str]) -> int:
    return links.start(args, argv, [links.Start(check(args).ranks[-1])], report)


def run(args: argparse.Namespace) -> None:
    setting = check(args)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", init_method="env://", timeout=timedelta(seconds=args.timeout)
    )
    rows = []
    for count in setting.ranks:
        group = dist.new_group(list(range(count)))  # all ranks call this, also those that are not in it
        for shape in setting.shapes:
            rows += sums.measure(setting, shape, count, group, device)
    about = circumstances(device)
    dist.destroy_process_group()
    links.hand_over(args, rows, about, report)


def report(args: argparse.Namespace, rows: list[dict], new: list[dict], circumstances: dict) -> None:
    shown = {key: column for key, column in COLUMNS.items() if any(row[key] is not None for row in new)}
    output.show(f"bench collective: {new[0]['dtype']}, {circumstances['device']}", shown, new)
    everything = [row | circumstances for row in rows]
    output.write_json(args.json, vars(args) | {"device": circumstances["device"]}, rows)
    output.write_csv(args.csv, everything)
    if args.figure:
        plot.draw_times(
            *(everything, args.figure, f"Sum over ranks, {new[0]['dtype']}"),
            panel=lambda row: f"{row['ranks']} ranks, {row['message_bytes'] / 2**20:.3g} MiB, {row['link']}",
            bar=lambda row: f"{row['codec']}, {row['algorithm']}",
            time="median_ms",
            speedup="speedup_vs_all_reduce",
        )
