"""`megatron-comp drop`: blocks without the sum after attention: which ones, and how to make up for it."""

import argparse

from ..subcommands import Subcommands
from . import curve, distill, group, sensitivity

EPILOG = None  # each step has its own

STEPS = Subcommands(
    "step",
    {
        "sensitivity": (sensitivity, "what each block's dropped sum costs on a text; ranks and classes of blocks"),
        "distill": (distill, "weights with which chosen blocks give what they gave before"),
        "group": (group, "weights with heads assigned to ranks anew, to start distillation of extreme blocks from"),
        "curve": (curve, "quality and bytes against the share of dropped sums"),
    },
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    STEPS.add_to(parser)


def check(args: argparse.Namespace) -> None:
    STEPS.chosen(args).check(args)


def run(args: argparse.Namespace) -> None:
    STEPS.chosen(args).run(args)
