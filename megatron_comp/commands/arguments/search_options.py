# SPDX-License-Identifier: Apache-2.0
"""Options of `search --with-drop`, and what they stand for: a link, a prompt, and distilled weights."""

import argparse

from ...predict.hardware import GPUS, WIRES

PROMPT_TOKENS = 1024


# By the names that argparse leaves them under.
NAMES = {
    "distilled": "--weights",
    "weights_out": "--weights-out",
    "wire": "--link",
    "calibration": "--calibration",
    "gpu": "--gpu",
    "prompt_tokens": "--prompt-tokens",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("dropped sums").add_argument
    add(
        "--with-drop",
        action="store_true",
        help="For each layer, also consider leaving attention's sum out; find the least predicted time of all sums.",
    )
    # Not where other subcommands leave --weights and --link: the model is built with its own, and no links are made.
    add(
        "--weights",
        dest="distilled",
        metavar="FILE",
        help="Weights of `megatron-comp drop distill`: a layer's sum may be dropped with these too.",
    )
    add("--weights-out", metavar="FILE", help="The safetensors file to write the weights of the chosen layers to.")
    add(
        "--link",
        dest="wire",
        metavar="LINK",
        help=f"The link of each rank: a rate, such as 100mbit, or one of {', '.join(WIRES)}. Without --gpu and "
        "--calibration codecs take no time.",
    )
    add(
        "--calibration",
        metavar="FILE",
        help="Link and codecs as `megatron-comp calibrate` measured them; --link gives another rate.",
    )
    add("--gpu", metavar="NAME", help=f"Codecs take their time by the memory of this GPU: one of {', '.join(GPUS)}.")
    add(
        "--prompt-tokens",
        type=int,
        metavar="T",
        help=f"Number of tokens of the prompt whose sums are timed (default {PROMPT_TOKENS}).",
    )
