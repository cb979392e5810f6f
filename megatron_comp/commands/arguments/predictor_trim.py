# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp predictor trim`: less work, where it is missed least."""

import argparse

from .. import options

DESCRIPTION = """\
Cut predictors to the work that a model can afford. Each sum gets a rank of its own, or no predictor: the ranks that
leave the least damage, and that together cost no more than one of --mean-rank for every sum of the model. Damage is
what a predictor leaves of its sum, as `predictor fit` measured it, times the sum's share of the residual stream.

Fit once with a large --rank, and trim as often as you like: this takes seconds, and needs no model.
"""
EPILOG = """\
Example:
  megatron-comp predictor fit --model /models/llama --tp 4 --text calibration.txt --rank 256 --out r256.safetensors
  megatron-comp predictor trim r256.safetensors --mean-rank 16 --out llama-tp4.predictor.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("predictor", metavar="FILE", help="A file of `megatron-comp predictor fit`.")
    add(
        "--mean-rank",
        type=int,
        required=True,
        metavar="R",
        help="All predictors together cost as much as this rank for every sum of the model would.",
    )
    add("--out", required=True, metavar="FILE", help="The safetensors file to write.")
    options.add_json(parser)
