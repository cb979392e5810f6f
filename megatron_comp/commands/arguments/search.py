# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp search`: a policy of fewest bits, or of least time, within a bound on what it costs in quality."""

import argparse

from ...wire.algorithms import FLAT
from .. import options
from . import search_options

DESCRIPTION = """\
Find the policy that sends the fewest bits and keeps a bound on what it costs in quality.

    1. Sensitivity: one backward pass over the calibration text tells, for every place that sums and every candidate
       codec, the KL that its rounding error alone costs. KL, since the perplexity of few tokens is noise.
    2. Choice: these add up, so the fewest bits within a budget are a knapsack problem, which is solved exactly.
    3. Check: the chosen policy runs on the text with real compressed sums. The budget is moved until what is measured
       is just within the bound.

two_step quantizes twice, and each of its steps may have a codec of its own in each place. --with-drop may also leave
out the sum after attention, and minimises predicted time on a link instead of bits.
"""


EPILOG = """\
Example:
  megatron-comp search --model /models/llama --tp 2 --text calibration.txt --max-kl 0.03 --out policy.yaml

With --state, searches with another bound, algorithm, link or distilled weights use the same measurements.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--paper", action=options.Moved, to="python -m research.paper_search")
    add_search(parser)
    parser.add_argument(
        "--algorithm",
        choices=FLAT,
        default="gather_sum",
        help="The algorithm that the policy will run with (default gather_sum).",
    )
    parser.add_argument(
        "--codec",
        action="append",
        default=[],
        metavar="C",
        help="A candidate. Repeat it for more (default: some forty of 2 to 8 bits).",
    )
    parser.add_argument(
        "--predictor",
        metavar="FILE",
        help="Predictors of `megatron-comp predictor fit`, which the policy will use: fewer bits keep the same bound.",
    )
    search_options.add_arguments(parser)


def add_search(parser: argparse.ArgumentParser) -> None:
    """Of every search: model, text, bound and files."""
    options.add_model(parser)
    options.add_tp(parser, what="Number of tensor-parallel ranks, 2 or more.")
    options.add_text(parser, 4096, "A calibration text. Judge the result by another one.")
    bound = parser.add_mutually_exclusive_group()
    bound.add_argument(
        "--max-kl", type=float, metavar="X", help="The bound: KL to the uncompressed model, in nats per token."
    )
    bound.add_argument(
        "--max-perplexity-increase", type=float, metavar="P", help="The bound: increase of perplexity, in percent."
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="The policy file to write.")
    parser.add_argument(
        "--min-bytes",
        type=options.min_bytes,
        default="auto",
        metavar="BYTES",
        help="The policy leaves smaller messages uncompressed (default auto). The search itself compresses all.",
    )
    options.add_state(parser)
    options.add_csv(parser)
    options.add_figure(parser, "bits against KL of every tried point")
    options.add_token_dispatcher(parser)
    options.add_dtype(parser)
    options.add_run_arguments(parser)
