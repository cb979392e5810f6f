# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp evaluate`: what compression does to a model's predictions on a text."""

import argparse

from .. import options

DESCRIPTION = """\
Measure what compression does to a model's predictions on a text: perplexity, KL divergence from the uncompressed model,
agreement on the most likely token, and bytes. The output has one row per codec and policy.
With --tasks: what it does to tasks of lm-evaluation-harness, one row per codec, task and metric.
Give --text or --tasks, one of the two.

--min-bytes is also that of policies: the min_bytes in their files is not used, and by default every message is
compressed.

A second table has 95 % intervals; in the files they are `<column>_low` and `<column>_high`. They come from a bootstrap
over windows, since tokens of one window depend on each other. Fewer than about ten windows make them too narrow.
"""


EPILOG = """\
Columns of the first table:
  algorithm      by which the sums were compressed; all_reduce where none was
  bits/value     all that travels, scales included
  +%             increase of perplexity over the uncompressed model, in percent
  KL, nats       mean over tokens of the KL divergence from the uncompressed model's predictions
  top-1          share of tokens where both models predict the same next token
  bytes/rank     what rank 0 received; each of N ranks receives 2(N-1)/N of the tensor of an uncompressed sum
  s              seconds that the row took
Columns of the second table, beside those of the first:
  KL             over tokens: mean, median, and what 95 and 99 % of the tokens stay below
  RMS of change of probability
                 root of the mean square change of the true next token's probability

Example:
  megatron-comp evaluate --model /models/llama --tp 2 --text prose.txt --codec mxfp4 --codec int4:32:fp16:hadamard
  megatron-comp evaluate --model /models/llama --tp 2 --tasks arc_easy,hellaswag --limit 500 --codec mxfp4 --items items
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser, "codecs and policies")
    options.add_text(parser, 6144, "A text of prose that the model was not tuned on; or give --tasks.", required=False)
    _add_tasks(parser)
    parser.add_argument(
        "--codec", action="append", default=[], metavar="C", help="A codec or preset. Repeat it for more rows."
    )
    options.add_csv(parser)


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_argument_group("tasks, in place of a text")
    tasks.add_argument(
        "--tasks",
        type=lambda names: [name for name in names.split(",") if name],
        metavar="A,B",
        help="Tasks of lm-evaluation-harness (the extra 'tasks' of this package).",
    )
    tasks.add_argument("--limit", type=int, metavar="N", help="Take only the first N items of each task.")
    tasks.add_argument("--include-path", metavar="DIR", help="A folder of further tasks, in the harness's YAML.")
    tasks.add_argument(
        "--items",
        metavar="DIR",
        help="Write there what each item of multiple choice was given, one file of JSON lines per codec and policy.",
    )
    options.add_state(tasks)
