# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp drop curve`: quality and bytes against the share of dropped sums."""

import argparse

from .. import options
from . import drop_options

DESCRIPTION = """\
Measure quality and bytes against the share of dropped sums, on a text that nothing was tuned on. Layers drop their sum
in the model's order and, with --sensitivity, from the least sensitive on; with --weights also with those weights in the
layers that drop; each with every --codec for the sums that are left. All are compared to the full, uncompressed model.
"""


RENAMED = {"--distilled": "--weights"}


EPILOG = """\
Example:
  megatron-comp drop curve --model /models/llama --tp 2 --text prose.txt --sensitivity sensitivity.json --csv curve.csv
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    drop_options.add_ranks(parser, 6144, "A text that nothing was tuned on.")
    add = parser.add_argument
    add("--sensitivity", metavar="FILE", help="JSON of `megatron-comp drop sensitivity`.")
    add("--weights", metavar="FILE", help="Weights of `megatron-comp drop distill` or `drop group`.")
    add(
        "--percent",
        type=float,
        nargs="+",
        default=[0, 25, 50, 75, 100],
        metavar="P",
        help="Shares of the layers, in percent (default 0 25 50 75 100).",
    )
    add(
        "--codec",
        action="append",
        default=[],
        metavar="C",
        help="A codec or preset for the sums that are left. Repeat it for more rows (default none).",
    )
    drop_options.add_predictor(parser)
    add("--in-order", action="store_true", help="With --sensitivity, also drop in the model's order.")
    options.add_state(parser)
    options.add_csv(parser)
    options.add_figure(parser, "the increase of perplexity by share")
