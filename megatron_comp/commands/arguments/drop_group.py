# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp drop group`: heads assigned to ranks anew."""

import argparse

from ...spd.criteria import CRITERIA
from . import drop_options

DESCRIPTION = """\
Assign heads to ranks anew, in layers that cannot do without attention's sum as they are. Without the sum each rank's
part of the MLP sees its own heads only, so it matters which heads stand together, and beside which part. Only the order
of heads changes: with the sum, the layer computes what it did.
"""


EPILOG = """\
Example:
  megatron-comp drop group --model /models/llama --tp 2 --text calibration.txt --blocks 0 --out grouped.safetensors

`megatron-comp drop distill --start FILE` goes on from these weights.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    drop_options.add_blocks(parser, tokens=4096)
    parser.add_argument(
        "--criterion",
        choices=("best", *CRITERIA),
        default="best",
        help="Heads of a rank far apart (diverse) or alike (similar), matched to the MLP by the largest norm (norm) or "
        "the least change (error). The default, best, takes what leaves the least error on this text, or no change.",
    )
