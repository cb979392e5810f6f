# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp evaluate`: what compression does to a model's predictions, on a text or on tasks."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..launcher import output
from ..policy import DROP
from ..quality.bootstrap import check_scipy
from ..quality.metrics import with_intervals
from . import checks, evaluate_tasks, options, setup

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
# A second table: each with its 95 % interval.
INTERVALS = {
    "perplexity_increase_pct": ("perplexity, +%", ".2f"),
    "kl": ("KL: mean", ".4f"),
    "kl_median": ("median", ".4f"),
    "kl_p95": ("95 %", ".3f"),
    "kl_p99": ("99 %", ".3f"),
    "top1_agreement": ("top-1", ".4f"),
    "rms_probability_change": ("RMS of change of probability", ".4f"),
}


def check(args: argparse.Namespace) -> list[setup.Setting]:
    checks.check_files(args)
    if bool(args.text) == bool(args.tasks):
        raise ValueError("give --text FILE or --tasks NAMES, one of the two")
    if args.text:
        checks.check_text(args)
        check_scipy()
    gate = args.min_bytes or 0  # of policies, too
    without = argparse.Namespace(**{**vars(args), "min_bytes": None})
    settings = [setting for setting in setup.settings(without, args.codec) if setting.name != "none"]  # it has a row
    settings = [replace(setting, policy=replace(setting.policy, min_bytes=gate)) for setting in settings]
    evaluate_tasks.check(args, settings)
    return settings


def run(args: argparse.Namespace) -> None:
    from ..quality.judge import Judge

    settings = check(args)
    if args.tasks:
        evaluate_tasks.run(args, settings)
        return
    with setup.opened(args) as (model, tokenizer):
        windows = setup.text_of(args).windows(tokenizer)
        overrides = setup.overrides(args, model, settings)
        judge = Judge(model, windows, overrides=overrides, keep=False)
        rows, kept = evaluate(judge, settings)
    if output.is_first_rank():
        scored = f"{len(windows)} windows of {args.context} tokens, {options.layout(args.tp, args.pp)}"
        output.show(f"evaluate: {Path(args.text).name}, {scored}", COLUMNS, rows)
        if settings:
            output.show("evaluate: with 95 % intervals", *_intervals(rows))
        output.write_json(args.json, vars(args), rows)
        output.write_csv(args.csv, rows)
        for line in kept:
            print(line)


def evaluate(judge: "Judge", settings: list[setup.Setting]) -> tuple[list[dict], list[str]]:
    """A row for the uncompressed model, then one for each setting, with the overrides' weights in blocks that it drops
    the sum of; and a line about every setting that left sums uncompressed."""
    trials = setup.trials(settings, judge.overrides)
    base, *_ = judged = judge.judge(trials, "evaluate")
    rows = [_row(name, each, base) for name, each in zip(["none", *(t.name for t in trials)], judged, strict=True)]
    return rows, [line for trial, each in zip(trials, judged[1:], strict=True) if (line := _kept(trial.name, each))]


def _intervals(rows: list[dict]) -> tuple[dict, list[dict]]:
    """Columns and rows of the second table. The uncompressed model has nothing to be compared with."""
    columns = {key: (heading, "s") for key, (heading, _) in INTERVALS.items()}
    return {"codec": COLUMNS["codec"], **columns}, [
        {"codec": row["codec"], **{key: output.with_interval(row, key, spec) for key, (_, spec) in INTERVALS.items()}}
        for row in rows[1:]
    ]


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
        **with_intervals(judged.quality, base.quality),
        "bytes_per_rank": judged.received_bytes,
        "seconds": judged.seconds,
    }
