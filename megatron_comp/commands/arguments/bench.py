# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp bench`: the subcommands that measure times."""

import argparse

from ..subcommands import Subcommands

DESCRIPTION = "Measure how fast codecs, sums and models are here, each beside an uncompressed baseline of the same run."


EPILOG = "Example: megatron-comp bench codec --codec mxfp4"


SUBCOMMANDS = Subcommands(
    "bench",
    {
        "codec": ("bench_codec", "Times of encode, decode and sum on one device, beside a plain copy of the tensor."),
        "collective": (
            "bench_collective",
            "Times of sums over ranks, stock, in 16 bits and compressed, on this machine's links or on slower ones.",
        ),
        "ttft": ("bench_ttft", "Time to first token of a model, stock and compressed, on links of any rate."),
    },
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    SUBCOMMANDS.add_to(parser)
