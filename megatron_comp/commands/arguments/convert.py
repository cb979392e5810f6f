# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp convert`: a distributed checkpoint of Megatron from one of Hugging Face."""

import argparse

from .. import options

DESCRIPTION = "Write a Hugging Face checkpoint as a distributed checkpoint of Megatron-Core."


EPILOG = """\
Example:
  megatron-comp convert --model /models/llama --out llama-megatron
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser, "Folder of a Hugging Face Llama or Mixtral checkpoint.")
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="A new folder, on storage that all ranks share. It gets the weights as Megatron loads them, config.json "
        "and the tokenizer's files, so that --model of the other subcommands takes it too.",
    )
    parser.add_argument(
        "--tp",
        type=int,
        default=1,
        metavar="N",
        help="Number of ranks that share the work and its memory (default 1). Any number reads the result.",
    )
    options.add_dtype(
        parser, "Data type of the written weights; auto (the default) is what the checkpoint's config.json says."
    )
    options.add_run_arguments(parser)
