# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp evaluate --tasks`: what compression does to the accuracy on tasks of lm-evaluation-harness."""

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..launcher import output, ranks
from . import checks, setup

if TYPE_CHECKING:
    from ..quality.tasks import TaskRun

COLUMNS = {
    "codec": ("codec", ""),
    "bits_per_value": ("bits/value", ".3f"),
    "task": ("task", ""),
    "items": ("items", ",d"),
    "metric": ("metric", ""),
    "value": ("value", ".4f"),
    "stderr": ("stderr", ".4f"),
}


def check(args: argparse.Namespace, settings: list[setup.Setting]) -> None:
    """Of a call without --tasks: that it has none of the options that go with them."""
    if not args.tasks:
        for name in ("limit", "include_path", "items", "state"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} goes with --tasks")
        return
    from ..quality.tasks import check_installed

    if args.pp > 1:
        raise ValueError("--pp goes with --text: the harness's model class knows no pipeline stages")
    check_installed()
    if args.limit is not None:
        checks.at_least_one(args, "limit")
    for option in ("include_path", "items"):
        if (folder := getattr(args, option)) and not Path(folder).is_dir():
            raise ValueError(f"--{option.replace('_', '-')} {folder}: no such folder")
    if args.items:
        files = [_items_file(args, setting) for setting in setup.with_baseline(settings)]
        if len(set(files)) < len(files):
            raise ValueError("--items: two of the codecs and policies would write the same file; rename a policy")
        for file in files:
            output.check_file("--items", str(file))


def run(args: argparse.Namespace, settings: list[setup.Setting]) -> None:
    """Stock first, then each setting, on the same items."""
    from ..files import digest
    from ..quality.items import write_items
    from ..quality.journal import Journal
    from ..quality.origin import on_ranks
    from ..quality.tasks import Tasks

    settings = setup.with_baseline(settings)
    rows = []
    with setup.opened(args) as (model, tokenizer), ranks.alone(args.state):
        overrides = setup.overrides(args, model, settings)
        weights = digest(args.weights) if args.weights else None
        journal = Journal(
            args.state, {**on_ranks(args.model, args.tp, next(model.parameters()).dtype), "weights": weights}
        )
        tasks = Tasks(args.tasks, args.include_path, args.limit)
        runs = tasks.run(model, tokenizer, setup.trials(settings, overrides), journal, overrides)
        for setting, made in zip(settings, runs, strict=True):
            rows += _rows(setting.name, made)
            if args.items and output.is_first_rank():
                write_items(_items_file(args, setting), _header(args, setting), made.items)
    if output.is_first_rank():
        output.show(f"evaluate: {', '.join(args.tasks)}, TP={args.tp}", COLUMNS, rows)
        output.write_json(args.json, vars(args), rows)
        output.write_csv(args.csv, rows)


def _rows(codec: str, made: "TaskRun") -> list[dict]:
    """One per task and metric. The harness calls a metric `acc,none` and its standard error `acc_stderr,none`."""
    sent = made.traffic.compressed.values + made.traffic.kept.values  # none where the journal knew every item
    return [
        {
            "codec": codec,
            "bits_per_value": made.traffic.bits_per_value if sent else None,
            "task": task,
            "items": found["items"],
            "metric": metric,
            "value": value,
            "stderr": stderr if isinstance(stderr := found.get(f"{metric}_stderr,{filter_}"), float) else None,
            "seconds": made.seconds,
        }
        for task, found in made.results.items()
        for key, value in found.items()
        for metric, comma, filter_ in [key.partition(",")]
        if comma and not metric.endswith("_stderr")
    ]


def _items_file(args: argparse.Namespace, setting: setup.Setting) -> Path:
    name = Path(setting.name).stem if setting.name in args.policy else setting.name
    return Path(args.items, re.sub(r"[^\w.-]+", "_", name) + ".jsonl")


def _header(args: argparse.Namespace, setting: setup.Setting) -> dict[str, object]:
    return {
        "model": Path(args.model).name,
        "policy": str(setting.policy),
        "setting": setting.name,
        "tp": args.tp,
        "dtype": setup.dtype_name(args),
        "versions": output.versions(),
        "command": shlex.join(["megatron-comp", *sys.argv[1:]]),
    }
