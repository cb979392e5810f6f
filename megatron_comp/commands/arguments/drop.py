# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp drop`: the steps towards blocks without the sum after attention."""

import argparse

from ..subcommands import Subcommands

DESCRIPTION = """\
Leave out the sum after attention in some blocks (sync-point drop, arXiv 2502.20727): `sensitivity` finds which blocks
bear it, `distill` trains weights that make up for it, `group` helps where that is not enough, `curve` measures the
result. `megatron-comp search --with-drop` then chooses blocks and codecs together.
"""


EPILOG = """\
Example:
  megatron-comp drop sensitivity --model llama --tp 2 --text calibration.txt --json sensitivity.json
"""


SUBCOMMANDS = Subcommands(
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
    SUBCOMMANDS.add_to(parser)
