# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp predictor fit`: predictors of a model's sums."""

import argparse

from .. import options
from . import drop_options

DESCRIPTION = """\
Find, for each sum of a Llama or Mixtral, which part of it follows from the layer's input: least squares of low rank on
a calibration text. Each predictor is checked on the last windows of the text, which the regression does not see. What
it leaves of a sum is a share of the sum's energy (the sum of squares): 0 is predicted fully, 1 not at all. A predictor
that leaves more than --most-left is not written.

For layers that drop attention's sum, the MLP's response to what is left of it is found as well. Such an MLP makes an
error, and "response: left" is the share of the error's energy that remains.

This runs in one process: the model's layers pass through memory one by one, with the activations of the whole text.
Every finished layer is written; after an interruption the same command goes on after the last one.
"""
EPILOG = """\
Example:
  megatron-comp predictor fit --model /models/llama --tp 4 --text calibration.txt --out llama-tp4.predictor.safetensors

A policy uses the file with `predictor: llama-tp4.predictor.safetensors`. Judge it by `megatron-comp evaluate --policy`,
on a text of another kind.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser, drop_options.MODEL)
    options.add_tp(parser, "ranks", "Number of tensor-parallel ranks that the predictors are for.")
    options.add_text(parser, 16384, drop_options.CALIBRATION_TEXT)
    add = parser.add_argument
    add(
        "--rank",
        type=int,
        default=64,
        metavar="R",
        help="Values per token that predict a sum (default 64). A token pays 3 x R x hidden multiplications per sum, "
        "and 2 x R x hidden more where attention's sum is dropped.",
    )
    add(
        "--most-left",
        type=float,
        default=0.95,
        metavar="SHARE",
        help="Write a predictor only if it leaves at most this share of its sum's energy (default 0.95).",
    )
    add(
        "--unseen", type=float, default=0.2, metavar="SHARE", help="Share of the windows that only check (default 0.2)."
    )
    add("--out", required=True, metavar="FILE", help="The safetensors file to write the predictors to.")
    options.add_json(parser)
