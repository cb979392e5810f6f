# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp evaluate`: what compression does to a model's predictions on a text."""

import argparse

from .. import options

DESCRIPTION = """\
Measure what compression does to a model's predictions on a text: perplexity, KL divergence from the uncompressed model,
agreement on the most likely token, and bytes. The output has one row per codec and policy. The codecs of a policy file
are judged whether or not its min_bytes would let these messages through, unless --min-bytes says otherwise.
"""


EPILOG = """\
Example:
  megatron-comp evaluate --model llama --tp 2 --text prose.txt --codec mxfp4 --codec int4:32:fp16:hadamard
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    options.add_text(parser, 6144, "A text file of prose that the model has not been tuned on.")
    parser.add_argument(
        "--codec", action="append", default=[], metavar="C", help="A codec or preset. Repeat it for more rows."
    )
