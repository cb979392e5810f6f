"""`megatron-comp evaluate`: what compression does to a model's predictions on a text."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..launcher import output
from ..quality.windows import read_windows
from . import options

if TYPE_CHECKING:
    from ..quality.judge import Judge, Judgement

COLUMNS = {
    "codec": ("codec", ""),
    "algorithm": ("algorithm", ""),
    "bits_per_value": ("bits/value", ".3f"),
    "perplexity": ("perplexity", ".3f"),
    "perplexity_increase_pct": ("+%", ".2f"),
    "kl": ("KL, nats", ".4f"),
    "top1_agreement": ("top-1", ".4f"),
    "bytes_per_rank": ("bytes/rank", ",d"),
    "seconds": ("s", ".1f"),
}


DESCRIPTION = """\
Measure what compression does to a model's predictions on a text: perplexity, KL divergence from the uncompressed model,
agreement on the most likely token, and bytes. The output has one row per codec and policy.
"""
EPILOG = """\
Example:
  megatron-comp evaluate --model llama --tp 2 --text prose.txt --codec mxfp4 --codec int4:32:fp16:hadamard
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    options.add_text(parser, 6144, "A text file of prose that the model has not been tuned on.")
    parser.add_argument(
        "--codec", action="append", default=[], metavar="C", help="A codec or preset. Repeat it for more rows."
    )


def check(args: argparse.Namespace) -> list[options.Setting]:
    options.check_files(args)
    options.check_text(args)
    return [setting for setting in options.settings(args, args.codec) if setting.name != "none"]  # its row is there


def run(args: argparse.Namespace) -> None:
    from ..quality.judge import Judge

    settings = check(args)
    with options.opened(args) as (model, tokenizer):
        windows = read_windows(args, tokenizer)
        overrides = options.overrides(args, model, settings)
        rows = evaluate(Judge(model, windows, overrides=overrides, keep=False), settings)
    if output.is_first_rank():
        scored = f"{len(windows)} windows of {args.context} tokens, TP={args.tp}"
        output.show(f"evaluate: {Path(args.text).name}, {scored}", COLUMNS, rows)
        output.write_json(args.json, vars(args), rows)


def evaluate(judge: "Judge", settings: list[options.Setting]) -> list[dict]:
    """A row for the uncompressed model, then one for each setting, with the overrides' weights in blocks that it drops
    the sum of."""
    from ..quality.judge import Trial

    found = judge.overrides
    trials = [Trial(each.name, each.policy, tuple(found.blocks_for(each.policy)) if found else ()) for each in settings]
    base, *_ = judged = judge.judge(trials, "evaluate")
    return [_row(name, each, base) for name, each in zip(["none", *(t.name for t in trials)], judged, strict=True)]


def _row(name: str, judged: "Judgement", base: "Judgement") -> dict:
    return {
        "codec": name,
        "algorithm": "+".join(sorted(judged.traffic.algorithms)) or "all_reduce",
        "bits_per_value": judged.traffic.bits_per_value,
        "perplexity": judged.perplexity,
        "perplexity_increase_pct": judged.increase_pct(base),
        "kl": judged.kl,
        "top1_agreement": judged.top1_agreement,
        "bytes_per_rank": judged.traffic.received_bytes,
        "seconds": judged.seconds,
    }
