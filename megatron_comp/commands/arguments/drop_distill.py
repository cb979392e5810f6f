# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp drop distill`: weights for layers without attention's sum."""

import argparse

from ...spd.criteria import LOSSES
from . import drop_options

DESCRIPTION = """\
Train weights with which layers without attention's sum give what the stock layers give. This runs in one process: the
model's layers pass through memory one by one, with the activations of the whole text. Every finished layer is written;
after an interruption the same command goes on after the last one.
"""


EPILOG = """\
Example:
  megatron-comp drop distill --model /models/llama --tp 2 --text handbook.txt --blocks 0,3-5 --out distilled.safetensors

The weights go with a policy that drops the same layers' sums, and only with it: in a stock layer they are wrong. After
--predictor, that policy must name the same predictor file.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    drop_options.add_blocks(parser, tokens=65536)
    add = parser.add_argument
    add("--policy-out", metavar="FILE", help="Also write a policy that drops the sums of those layers.")
    add("--start", metavar="FILE", help="Weights to start from, as `megatron-comp drop group` writes them.")
    drop_options.add_predictor(parser)
    add("--epochs", type=int, default=10, metavar="E", help="Number of passes over the text (default 10).")
    add("--batch", type=int, default=4, metavar="B", help="Number of windows per step (default 4).")
    add(
        "--learning-rate",
        type=float,
        default=1e-3,
        metavar="R",
        help="Learning rate of AdamW; it falls to 0 as a cosine (default 1e-3, for a model of 135M; the paper: 5e-5 "
        "for Llama-2).",
    )
    add(
        "--loss",
        choices=LOSSES,
        default="relative",
        help="The loss, of the difference from the full layer's output: relative (default) to each token's mean "
        "square, or mse, as in the paper.",
    )
    add("--seed", type=int, default=1, metavar="S", help="Seed of the order of windows (default 1).")
    add("--log", metavar="FILE", help="Write the loss there as CSV, a line per epoch.")
