# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp predictor trim`: less work, where it is missed least."""

import argparse

from .. import options

DESCRIPTION = """\
Cut predictors to the work that they are worth. Each sum gets a rank of its own, or no predictor, so that all together
do the least damage for the work. Damage is what a predictor leaves of its sum, as `predictor fit` measured it, times
the sum's share of the residual stream. That is what rounding costs: for sums that are left out, take
the whole predictor.

Fit once with a large --rank, and trim as often as you like: this takes seconds, and needs no model.
"""
EPILOG = """\
Example:
  megatron-comp predictor fit --model /models/llama --tp 4 --text calibration.txt --rank 256 --out r256.safetensors
  megatron-comp predictor trim r256.safetensors --work 5 --out llama-tp4.predictor.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("predictor", metavar="FILE", help="A file of `megatron-comp predictor fit`.")
    add(
        "--work",
        type=float,
        required=True,
        metavar="PERCENT",
        help="Work that predictors may add to a rank, in percent of what the model's layers multiply. A sum that is "
        "predicted counts as its rank and 32 columns more, for a norm and two passes over it.",
    )
    add("--out", required=True, metavar="FILE", help="The safetensors file to write.")
    options.add_json(parser)
