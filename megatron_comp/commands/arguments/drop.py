# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp drop`: the steps towards layers without the sum after attention."""

import argparse

from ..subcommands import Subcommands

DESCRIPTION = """\
Leave out the sum after attention in some layers (sync-point drop, arXiv 2502.20727): `sensitivity` finds which layers
bear it, `distill` trains weights that make up for it, `group` helps where that is not enough, `curve` measures the
result. `megatron-comp search --with-drop` then chooses layers and codecs together.
"""


EPILOG = """\
Example:
  megatron-comp drop sensitivity --model /models/llama --tp 2 --text calibration.txt --json sensitivity.json
"""


SUBCOMMANDS = Subcommands(
    "step",
    {
        "sensitivity": (
            "drop_sensitivity",
            "Measure what each layer's dropped sum costs on a text, and rank the layers.",
        ),
        "distill": ("drop_distill", "Train weights with which chosen layers give what they gave before."),
        "group": ("drop_group", "Assign heads to ranks anew, to start the distillation of extreme layers."),
        "curve": ("drop_curve", "Measure quality and bytes against the share of dropped sums."),
    },
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    SUBCOMMANDS.add_to(parser)
