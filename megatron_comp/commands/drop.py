"""`megatron-comp drop`: blocks without the sum after attention: which ones, and how to make up for it."""

import argparse

from .subcommands import Subcommands

EPILOG = None  # each step has its own

STEPS = Subcommands(
    "step",
    {
        "sensitivity": (
            "drop_sensitivity",
            "Measure what each block's dropped sum costs on a text, and rank the blocks.",
        ),
        "distill": ("drop_distill", "Train weights with which chosen blocks give what they gave before."),
        "group": ("drop_group", "Assign heads to ranks anew, to start the distillation of extreme blocks."),
        "curve": ("drop_curve", "Measure quality and bytes against the share of dropped sums."),
    },
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    STEPS.add_to(parser)


def check(args: argparse.Namespace) -> None:
    STEPS.chosen(args).check(args)


def run(args: argparse.Namespace) -> None:
    STEPS.chosen(args).run(args)
