# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp predictor`: send only what the other ranks cannot predict."""

import argparse

from ..subcommands import Subcommands

DESCRIPTION = """\
All ranks hold the input of a layer, and part of every rank's partial sum follows from it. With a predictor each rank
computes that part of all ranks' sums by itself, and only the rest is compressed and sent: the same bytes lose less.
"""
EPILOG = """\
Example:
  megatron-comp predictor fit --model /models/llama --tp 4 --text calibration.txt --out llama-tp4.predictor.safetensors
"""

SUBCOMMANDS = Subcommands(
    "step",
    {
        "fit": ("predictor_fit", "Find a predictor for each sum of a model, and keep those that help."),
        "trim": ("predictor_trim", "Cut predictors to an amount of work, where they are missed least."),
    },
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    SUBCOMMANDS.add_to(parser)
