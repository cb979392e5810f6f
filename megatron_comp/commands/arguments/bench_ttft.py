# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp bench ttft`: times of prefill and decoding of a model."""

import argparse

from .. import options

DESCRIPTION = "Time a model's prefill, and with --new-tokens its decoding, in one run: stock and compressed."


RENAMED = {"--tokens": "--prompt-tokens"}


EPILOG = f"""\
Example:
  megatron-comp bench ttft --model llama --tp 2 --codec mxfp4 --link 100mbit

One row a setting, in the table and in the files; the first is the model with stock communication:
  policy         codec of every reduction, or the policy file; none: stock
  algorithm      of the reductions that were compressed, all_reduce where none was
  tp, link, prompt_tokens, dtype
                 what was run; but for the link in the table's title
  dropped        sums that the policy leaves out
  ttft_ms, p20_ms, p80_ms
                 milliseconds of a prefill with KV cache, until the last rank has the first token: median over the runs
  speedup_vs_none
                 the median of the stock row over this one's, on the same link
  speedup_low, speedup_high
                 its 95 % confidence interval: turns drawn again, with replacement; too narrow for fewer than ten --runs
  bytes_per_rank received by rank 0 in the sums of one prefill, stock ones counted as rings
  decode_ms, decode_speedup, ..._low, ..._high
                 with --new-tokens: milliseconds a token after the first, in the same way
The CSV file adds device, torch, triton, megatron_comp and date.

How: the prompt is random tokens of the vocabulary, as a dense model's time does not depend on them. All settings run in
turn, so that a slow moment hits all alike, another one first every time, each once before anything counts.

{options.LINKS}
A policy file's `min_bytes: auto` goes by `megatron-comp calibrate`; a codec compresses every message (--min-bytes 0).

--weights are in all rows, the first included: the time does not depend on them.

What the figures do not show: several requests at once, and what the policy does to the model's predictions,
for which see `megatron-comp evaluate`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    add = parser.add_argument
    options.add_prompt_tokens(parser)
    add("--codec", action="append", default=[], metavar="C", help="A codec or preset. Repeat it for more rows.")
    options.add_links(parser)
    add(
        "--new-tokens",
        type=int,
        default=1,
        metavar="K",
        help="Number of tokens to generate (default 1); with more than one, decoding is timed too.",
    )
    options.add_runs(parser, 5, "How often every setting runs, in turn")
    options.add_csv(parser)
    options.add_figure(parser, "the times")
