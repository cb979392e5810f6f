# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp evaluate`: what compression does to a model's predictions, on a text or on tasks."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..launcher import output
from ..policy import DROP
from ..quality.windows import read_windows
from . import evaluate_tasks, options

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
agreement on the most likely token, and bytes. The output has one row per codec and policy. The codecs of a policy file
are judged whether or not its min_bytes would let these messages through, unless --min-bytes says otherwise.
With --tasks in place of --text: what it does to tasks of lm-evaluation-harness, one row per codec, task and metric.
"""
EPILOG = """\
Example:
  megatron-comp evaluate --model llama --tp 2 --text prose.txt --codec mxfp4 --codec int4:32:fp16:hadamard
  megatron-comp evaluate --model llama --tp 2 --tasks arc_easy,hellaswag --limit 500 --codec mxfp4 --items items
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    options.add_text(parser, 6144, "A text file of prose that the model has not been tuned on.", required=False)
    evaluate_tasks.add_arguments(parser)
    parser.add_argument(
        "--codec", action="append", default=[], metavar="C", help="A codec or preset. Repeat it for more rows."
    )


def check(args: argparse.Namespace) -> list[options.Setting]:
    options.check_files(args)
    if bool(args.text) == bool(args.tasks):
        raise ValueError("give --text FILE or --tasks NAMES, one of the two")
    if args.text:
        options.check_text(args)
    gate = args.min_bytes or 0  # of policies, too
    without = argparse.Namespace(**{**vars(args), "min_bytes": None})
    settings = [setting for setting in options.settings(without, args.codec) if setting.name != "none"]  # it has a row
    settings = [replace(setting, policy=replace(setting.policy, min_bytes=gate)) for setting in settings]
    evaluate_tasks.check(args, settings)
    return settings


def run(args: argparse.Namespace) -> None:
    from ..quality.judge import Judge

    settings = check(args)
    if args.tasks:
        evaluate_tasks.run(args, settings)
        return
    with options.opened(args) as (model, tokenizer):
        windows = read_windows(args, tokenizer)
        overrides = options.overrides(args, model, settings)
        judge = Judge(model, windows, overrides=overrides, keep=False)
        rows, kept = evaluate(judge, settings)
    if output.is_first_rank():
        scored = f"{len(windows)} windows of {args.context} tokens, TP={args.tp}"
        output.show(f"evaluate: {Path(args.text).name}, {scored}", COLUMNS, rows)
        output.write_json(args.json, vars(args), rows)
        for line in kept:
            print(line)


def evaluate(judge: "Judge", settings: list[options.Setting]) -> tuple[list[dict], list[str]]:
    """A row for the uncompressed model, then one for each setting, with the overrides' weights in blocks that it drops
    the sum of; and a line about every setting that left sums uncompressed."""
    trials = options.trials(settings, judge.overrides)
    base, *_ = judged = judge.judge(trials, "evaluate")
    rows = [_row(name, each, base) for name, each in zip(["none", *(t.name for t in trials)], judged, strict=True)]
    return rows, [line for trial, each in zip(trials, judged[1:], strict=True) if (line := _kept(trial.name, each))]


def _kept(name: str, judged: "Judgement") -> str | None:
    """Why a row that looks harmless may be: nothing, or not all, was compressed."""
    compressed, kept = judged.traffic.compressed.calls, judged.traffic.kept.calls
    if not kept:
        return None
    reasons = judged.traffic.kept_because.items()
    because = ", ".join(f"{count} ({reason})" for reason, count in reasons if reason != DROP)
    return f"{name}: {compressed} of {compressed + kept} sums were compressed; uncompressed: {because}"


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
