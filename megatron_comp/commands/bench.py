"""`megatron-comp bench`: how fast it is here, beside what it is compared to, in one run."""

import argparse

from . import bench_codec, bench_collective, bench_ttft
from .subcommands import Subcommands

EPILOG = None  # each bench has its own

BENCHES = Subcommands(
    "bench",
    {
        "codec": (bench_codec, "encode, decode and sum on one device, beside a plain copy of the tensor"),
        "collective": (
            bench_collective,
            "the sum over ranks, stock, in 16 bits and compressed, as they are or on links of a rate",
        ),
        "ttft": (bench_ttft, "time to first token of a model, stock and compressed, as they are or on links of a rate"),
    },
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    BENCHES.add_to(parser)


def check(args: argparse.Namespace) -> None:
    BENCHES.chosen(args).check(args)


def start(args: argparse.Namespace, argv: list[str]) -> int:
    """Of a bench with `--link`, where no ranks were started yet: runs `megatron-comp argv` on ranks of its own."""
    return BENCHES.chosen(args).start(args, argv)


def run(args: argparse.Namespace) -> None:
    BENCHES.chosen(args).run(args)
