# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp evaluate`: what compression does to a model's predictions on a text."""

import argparse

from .. import options

DESCRIPTION = """\
Measure what compression does to a model's predictions on a text: perplexity, KL divergence from the uncompressed model,
agreement on the most likely token, and bytes. The output has one row per codec and policy. The codecs of a policy file
are judged whether or not its min_bytes would let these messages through, unless --min-bytes says otherwise.

A second table has 95 % intervals; in the files they are `<column>_low` and `<column>_high`. They come from a bootstrap
over windows, since tokens of one window depend on each other. Fewer than about ten windows make them too narrow.
"""


EPILOG = """\
Columns of the second table, beside those of the first:
  KL             over tokens: mean, median, and what 95 and 99 % of the tokens stay below
  RMS of change of probability
                 root of the mean square change of the true next token's probability

Example:
  megatron-comp evaluate --model llama --tp 2 --text prose.txt --codec mxfp4 --codec int4:32:fp16:hadamard
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    options.add_text(parser, 6144, "A text file of prose that the model has not been tuned on.")
    parser.add_argument(
        "--codec", action="append", default=[], metavar="C", help="A codec or preset. Repeat it for more rows."
    )
    options.add_csv(parser)
