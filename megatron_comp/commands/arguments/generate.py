# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp generate`: text, and what it took."""

import argparse

from .. import options

ENGINES = ("static", "dynamic")


DESCRIPTION = "Continue a prompt greedily; show time to first token, decode rate and bytes received."


RENAMED = {"--max-new-tokens": "--new-tokens"}


EPILOG = """\
Example:
  megatron-comp generate --model /models/llama --tp 2 --prompt "The capital of France is" --codec mxfp4

--codec compresses every message, however small, so that its effect can be seen. `apply_compression(model, "mxfp4")`
and a policy file leave messages uncompressed that are predicted to gain nothing; --codec with --min-bytes auto does the
same. Give one --codec or one --policy, not both.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    parser.add_argument(
        "--prompt",
        required=True,
        action="append",
        metavar="TEXT",
        help="The text to continue. With --engine dynamic it may be repeated: all prompts are continued together.",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="static",
        help="static (the default): one prompt, with a cache of its own. dynamic: Megatron's engine for several "
        "prompts at once; it needs GPUs and flash-attn 2.7.3 or newer.",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="The prompt is what a user says: put it into the tokenizer's chat template.",
    )
    parser.add_argument(
        "--codec", metavar="C", help="A codec or preset for every sum. With none (the default) sums are uncompressed."
    )
    parser.add_argument(
        "--new-tokens", type=int, default=32, metavar="K", help="Generate at most this many tokens (default 32)."
    )
