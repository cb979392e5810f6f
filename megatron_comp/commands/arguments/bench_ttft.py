# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp bench ttft`: times of prefill and decoding of a model."""

import argparse

from .. import options

DTYPE = """\
Of weights, activations and sums: default bf16, as models are served, also on a CPU; other subcommands take fp32 there,
in which less is lost besides what codecs lose. A processor with AVX2 alone multiplies through fp32."""
DESCRIPTION = "Time a model's prefill, and with --new-tokens its decoding, in one run: stock and compressed."


RENAMED = {"--tokens": "--prompt-tokens"}


EPILOG = f"""\
Example:
  megatron-comp bench ttft --model /models/llama --tp 2 --codec mxfp4 --link 100mbit

One row per layout and setting, in the table and in the files; the first of a layout is the model with stock sums:
  layout         tensor-parallel ranks and pipeline stages; --layout adds more, which run after the first
  policy         codec of every reduction, or the policy file; none: stock
  algorithm      of the reductions that were compressed, all_reduce where none was
  tp, pp, link, prompt_tokens, dtype
                 what was run; but for the link in the table's title
  dropped        sums that the policy leaves out
  ttft_ms, p20_ms, p80_ms
                 milliseconds of a prefill with KV cache, until the last rank has the first token: median over the runs
  speedup_vs_none
                 the median of the layout's stock row over this one's, on the same link
  speedup_low, speedup_high
                 its 95 % confidence interval: turns drawn again, with replacement; too narrow for fewer than ten --runs
  speedup_vs_first
                 the median of the first layout's stock row over this one's, on the same link
  bytes_per_rank received in one prefill by the rank that receives most: sums, stock ones counted as rings, and the
                 activations of a pipeline
  decode_ms, decode_speedup, ..._low, ..._high
                 with --new-tokens: milliseconds a token after the first, in the same way
The CSV file adds device, torch, triton, megatron_comp and date.

How: the prompt is random tokens of the vocabulary, as a dense model's time does not depend on them. All settings run in
turn, so that a slow moment hits all alike, another one first every time, each once before anything counts.

{options.LINKS}
A policy file has its own min_bytes, and `auto` goes by `megatron-comp calibrate`. --codec compresses every message,
unless --min-bytes says otherwise.

--weights are in all rows of layouts with --tp ranks, stock ones included: the time does not depend on them.

What the figures do not show: several requests at once, and what the policy does to the model's predictions,
for which see `megatron-comp evaluate`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser, what=DTYPE, default="bf16")
    add = parser.add_argument
    options.add_prompt_tokens(parser)
    add(
        "--layout",
        action="append",
        default=[],
        metavar="TPxPP",
        help="Time other ranks and stages too, as in 2x2 for --tp 2 --pp 2, on the same links. Fewer ranks than those "
        "of --tp and --pp fill machine after machine. Repeat it for more.",
    )
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
