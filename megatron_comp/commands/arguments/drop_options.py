# SPDX-License-Identifier: Apache-2.0
"""What the steps of `megatron-comp drop` share: options, their checks, and the text as tokens."""

import argparse

from .. import options

MODEL = "Folder of a Hugging Face Llama checkpoint."


CALIBRATION_TEXT = "A calibration text. Judge the result by another one."


def add_ranks(parser: argparse.ArgumentParser, tokens: int, text: str = CALIBRATION_TEXT) -> None:
    """Of a step that measures on ranks. tokens: the default. text: help on which text it should be."""
    options.add_model(parser, MODEL)
    options.add_tp(parser)
    options.add_text(parser, tokens, text)
    options.add_dtype(parser)
    options.add_run_arguments(parser)
    parser.set_defaults(token_dispatcher="allgather")  # of a mixture of experts, whose layers drop nothing


def add_predictor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--predictor",
        metavar="FILE",
        help="Predictors of `megatron-comp predictor fit`: layers that drop their sum see the other ranks' predicted "
        "parts.",
    )


def add_blocks(parser: argparse.ArgumentParser, tokens: int) -> None:
    """Of a step that writes weights of layers, in one process."""
    options.add_model(parser, MODEL)
    options.add_tp(parser, "ranks", "Number of tensor-parallel ranks that the weights are for.")
    options.add_text(parser, tokens, CALIBRATION_TEXT)
    parser.add_argument("--blocks", required=True, metavar="LIST", help="The layers to work on, as in 0,3-5.")
    parser.add_argument("--out", required=True, metavar="FILE", help="The safetensors file to write their weights to.")
    options.add_json(parser)
