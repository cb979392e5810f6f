# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp report`: one page of what other commands measured."""

import argparse

from .. import options

DESCRIPTION = """\
Put what other commands have measured on one page that can be shown to a colleague: bytes, quality on texts and tasks
with confidence intervals, figures, times, versions, and the commands that make it again.

Every input is optional; what is not given is named on the page. The page is one HTML file, without scripts, or Markdown
with its figures in files beside it.
"""
EPILOG = """\
Example:
  megatron-comp report --out report.html --evaluate text.json --items none.jsonl --items mxfp4.jsonl --ttft ttft.csv

Of items files, one is of the uncompressed model (setting none); all others are compared with it, item by item. The same
setting in several files is one row of the first table.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def add(name: str, what: str, **more: object) -> None:
        parser.add_argument(name, metavar="FILE", help=what, **more)

    add("--out", "The page to write: Markdown if the name ends in .md, else HTML.", required=True)
    parser.add_argument("--title", help="The page's title (default: the model and its number of ranks).")
    several = {"action": "append", "default": []}
    add("--evaluate", "Rows of `evaluate`, as --json or --csv. Repeat it for another text.", **several)
    add("--items", "Scored items of `evaluate --tasks`. Repeat it for every setting.", **several)
    add("--ttft", "Rows of `bench ttft`, as --json or --csv. Repeat it for more.", **several)
    add("--search", "Rows of `search`, as --json or --csv.")
    add("--sensitivity", "The --state of `search`, or rows of `drop sensitivity`: where KL comes from.")
    add("--policy", "A policy file, to be shown. Repeat it for more.", **several)
    options.add_json(parser)
    options.add_csv(parser)
