# SPDX-License-Identifier: Apache-2.0
"""Windows of tokens from a text."""

import argparse

import torch

from ..inference.text import read_text


def read_windows(args: argparse.Namespace, tokenizer):
    """int64 `[windows, context]` from the start of `args.text`. Raises ValueError if it is too short or no text."""
    # The start of the file holds what is needed: no token is longer than a few dozen characters, few as long as 8.
    text = read_text(args.text)
    count = args.tokens // args.context * args.context
    ids = tokenizer.encode(text[: 8 * count])
    if len(ids) < count:
        ids = tokenizer.encode(text)
    if len(ids) < count:
        raise ValueError(f"--text {args.text} has {len(ids)} tokens, {count} are needed")
    return torch.tensor(ids[:count]).view(-1, args.context)
