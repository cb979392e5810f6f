# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp drop sensitivity`: what each layer's dropped sum costs."""

import argparse

from .. import options
from . import drop_options

DESCRIPTION = """\
Measure what each layer's dropped sum costs on a text, and rank the layers. There are two measures: the paper's (arXiv
2502.20727, section 3), perplexity with layers i to last dropped, less that with i + 1 to last dropped; and KL to the
full model with layer i alone dropped, which the noise of a short text and the damage of other layers do not reach. Two
thresholds split the layers into insensitive ones (to be dropped as they are), sensitive ones (to be distilled) and
extreme ones (to be grouped, then distilled).
"""


EPILOG = """\
Example:
  megatron-comp drop sensitivity --model /models/llama --tp 2 --text calibration.txt --json sensitivity.json

With --state, runs with other thresholds use the same measurements.
"""


MEASURES = {"kl": "kl", "perplexity": "perplexity_delta"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    drop_options.add_ranks(parser, tokens=2048)
    parser.add_argument(
        "--rank-by", choices=MEASURES, default="kl", help="The measure by which layers are ranked (default kl)."
    )
    parser.add_argument(
        "--thresholds",
        type=float,
        nargs=2,
        metavar=("T1", "T2"),
        help="Of that measure: insensitive up to T1, extreme above T2 (default: 1 %% and 5 %% of the full model's "
        "perplexity, or 0.01 and 0.05 nats).",
    )
    options.add_state(parser)
    options.add_figure(parser, "both measures by layer")
