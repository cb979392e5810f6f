# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp bench collective`: times of sums over ranks."""

import argparse
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ..bench import plot, sums
from ..bench.circumstances import circumstances
from ..launcher import output
from ..wire.codec import Codec, CodecPair, parse_codec
from ..wire.cost import ALGORITHMS
from ..wire.together import join_job
from . import checks, links, setup
from .arguments.bench_collective import CODECS, SHAPE

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


@dataclass(frozen=True)
class SumTiming:
    """What is run, checked."""

    codecs: dict[str, Codec | CodecPair]
    algorithms: list[str]
    ranks: list[int]
    shapes: list[tuple[int, int]]
    dtype: torch.dtype
    repeats: int


def check(args: argparse.Namespace) -> SumTiming:
    links.check(args)
    checks.check_written(args)
    checks.at_least_one(args, "runs")
    checks.check_timeout(args)
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
        shapes=[checks.shape(text, SHAPE) for text in args.shape or [SHAPE]],
        dtype=getattr(torch, setup.dtype_name(args)),
        repeats=args.runs,
    )


def start(args: argparse.Namespace, argv: list[str]) -> int:
    return links.start(args, argv, [links.Start(check(args).ranks[-1])], report)


def run(args: argparse.Namespace) -> None:
    setting = check(args)
    join_job(timedelta(seconds=args.timeout))
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
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
