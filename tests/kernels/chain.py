# SPDX-License-Identifier: Apache-2.0
"""What a whole sum of many ranks costs besides its wire, on one GPU: kernels, launches and Python.

One process is rank 0 of a group that is not there (torch's fake process group). Collectives do nothing: what is decoded
is whatever the memory holds, which takes as long as messages do.

Usage: python tests/kernels/chain.py [--rows 1024]... [--hidden 8192] [--codec mxfp4]... [--ranks 8] [--csv FILE]

Prints microseconds per sum, the median of the rounds, beside a plain copy of the tensor: `eager` by the wall clock,
`graph` as one CUDA graph of many sums. Without a GPU it runs on the CPU, where there are no graphs.
"""

import argparse
import csv
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


def nothing(*_, **__) -> None:
    """A collective that is over at once."""


# The fake group's own collectives copy what they are given. Before wire/exchange.py takes them by name.
for name in ("all_gather_single", "all_gather_into_tensor", "all_to_all_single"):
    setattr(dist, name, nothing)

from megatron_comp.bench import timing  # noqa: E402
from megatron_comp.wire import collectives  # noqa: E402

CODECS = ["mxfp4", "nvfp4", "int4:32:fp16", "int4:32:fp16:hadamard"]
ROWS = [8, 128, 1024, 4096, 8192]
COLUMNS = ["rows", "hidden", "ranks", "codec", "algorithm", "eager_us", "graph_us"]


def eager_us(call, calls: int, rounds: int, device: torch.device) -> float:
    """Until the device is done with all of a round's calls."""
    wait = torch.cuda.synchronize if device.type == "cuda" else nothing
    call()
    seconds = []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        seconds.append((time.perf_counter() - start) / calls)
    return round(timing.percentiles(seconds)["median_ms"] * 1e3, 1)


def graph_us(call, calls: int, rounds: int, device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    graph = timing.capture(lambda _: call(), list(range(calls)))
    graph.replay()  # the first replay also uploads it
    seconds = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3 / calls)
    return round(timing.percentiles(seconds)["median_ms"] * 1e3, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", action="append", type=int, help=f"of the tensor (default: {ROWS})")
    parser.add_argument("--hidden", type=int, default=8192, help="values per row (default: 8192)")
    parser.add_argument("--codec", action="append", help=f"default: {', '.join(CODECS)}")
    parser.add_argument("--ranks", type=int, default=8, help="of the group that is not there (default: 8)")
    parser.add_argument("--calls", type=int, default=20, help="sums per round (default: 20)")
    parser.add_argument("--rounds", type=int, default=9, help="default: 9")
    parser.add_argument("--csv", type=Path, help="write the table to this file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dist.init_process_group("fake", rank=0, world_size=args.ranks, store=FakeStore())
    table = []

    def measure(rows, codec, algorithm, call):
        figures = [time_of(call, args.calls, args.rounds, device) for time_of in (eager_us, graph_us)]
        table.append(dict(zip(COLUMNS, [rows, args.hidden, args.ranks, codec, algorithm, *figures])))
        print(*(f"{'-' if value is None else value!s:>21}" for value in table[-1].values()), flush=True)

    print(*(f"{column:>21}" for column in COLUMNS))
    for rows in args.rows or ROWS:
        x = torch.randn(rows, args.hidden, device=device, dtype=torch.bfloat16)
        y = torch.empty_like(x)
        measure(rows, "none", "copy", lambda x=x, y=y: y.copy_(x))
        for codec in args.codec or CODECS:
            for algorithm in ("gather_sum", "two_step"):

                def call(x=x, codec=codec, algorithm=algorithm):
                    collectives.all_reduce(x, codec, None, algorithm, chunks=1)

                measure(rows, codec, algorithm, call)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
