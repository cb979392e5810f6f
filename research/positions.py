# SPDX-License-Identifier: Apache-2.0
"""Perplexity and KL divergence by position in a long context: does compression cost more the longer the text is?

    python -m research.positions --model MODEL --tp 3 --text sotu.txt --tokens 8192 --context 8192 --dtype bf16 \\
        --codec int8:32:fp16 --codec mxfp4 --csv positions.csv

One row per setting and range of positions, written after each window; the uncompressed model is the first setting. All
read the same windows, from the start of the text.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_comp.commands import checks, options, setup
from megatron_comp.inference.generate import logits, vocab_start
from megatron_comp.launcher import output, ranks
from megatron_comp.layers.apply import apply_compression, remove_compression
from megatron_comp.quality.judge import Judgement
from megatron_comp.quality.metrics import Prediction, increase_pct, perplexity

COLUMNS = {
    "codec": ("codec", ""),
    "first": ("from position", ",d"),
    "last": ("to", ",d"),
    "tokens": ("tokens", ",d"),
    "perplexity": ("perplexity", ".3f"),
    "perplexity_increase_pct": ("+%", ".2f"),
    "kl": ("KL, nats", ".4f"),
    "top1_agreement": ("top-1", ".4f"),
}
FIRST_END = 256  # of the first range; each further one is as long as all before it


def ranges(context: int) -> list[tuple[int, int]]:
    """Of positions that predict a token: 0 to 255, 256 to 511, 512 to 1023, and so on; the end is not in a range."""
    ends = [0, min(FIRST_END, context - 1)]
    while ends[-1] < context - 1:
        ends.append(min(2 * ends[-1], context - 1))
    return list(zip(ends, ends[1:]))


def by_position(model, windows: torch.Tensor, settings: list[setup.Setting]) -> Iterator[list[dict]]:
    """The rows after each window, of which all settings read one after another.

    Predictions are made one range at a time, since whole ones take gigabytes.
    """
    start, group = vocab_start(model), model.tp_group
    parts = ranges(windows.shape[1])
    measured = {setting.name: [Judgement() for _ in parts] for setting in settings}
    for window in windows:
        remove_compression(model)
        stock = logits(model, window[None])[0]
        for setting in settings:
            out = stock
            if setting is not setup.NONE:
                apply_compression(model, setting.policy)
                out = logits(model, window[None])[0]
            for (first, end), judged in zip(parts, measured[setting.name], strict=True):
                reference, said = (Prediction.of(each[first:end], start, group) for each in (stock, out))
                judged.quality.add(said, reference, window[first + 1 : end + 1].to(out.device), start, group)
        yield [row for name, judged in measured.items() for row in rows(name, parts, judged, measured["none"])]


def rows(codec: str, parts: list[tuple[int, int]], judged: list[Judgement], stock: list[Judgement]) -> Iterator[dict]:
    for (first, end), ours, theirs in zip(parts, judged, stock, strict=True):
        yield {
            "codec": codec,
            "first": first,
            "last": end - 1,
            "tokens": sum(window.shape[1] for window in ours.quality.windows),
            "perplexity": perplexity(ours.nll),
            "perplexity_increase_pct": increase_pct(ours.nll, theirs.nll),
            "kl": ours.kl,
            "top1_agreement": ours.top1_agreement,
        }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_arguments(parser)
    options.add_text(parser, 8192, "A text that the model has not been tuned on.")
    parser.set_defaults(context=8192)
    parser.add_argument("--codec", action="append", default=[], metavar="C", help="A codec or preset; repeat it.")
    options.add_csv(parser)
    args = parser.parse_args(argv)
    if args.pp > 1:
        parser.error("--pp: this program runs on tensor-parallel ranks alone")
    settings = setup.with_baseline(setup.settings(args, args.codec))
    checks.check_text(args)
    if not ranks.joined():
        return ranks.start(args.tp, [sys.executable, "-m", "research.positions", *(argv or sys.argv[1:])])
    with setup.opened(args) as (model, tokenizer):
        windows = setup.text_of(args).windows(tokenizer)
        for found in by_position(model, windows, settings):
            if output.is_first_rank():
                output.write_csv(args.csv, found)
    if output.is_first_rank():
        output.show(f"by position: {Path(args.text).name}, {len(windows)} windows, TP={args.tp}", COLUMNS, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
