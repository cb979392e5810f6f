# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp evaluate --tasks`: what compression does to the accuracy on tasks of lm-evaluation-harness."""

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..launcher import output, ranks
from . import options

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
        "--items", metavar="DIR", help="Write there what each item was given, one file of JSON lines per codec."
    )
    options.add_state(tasks)


def check(args: argparse.Namespace, settings: list[options.Setting]) -> None:
    """Of a call without --tasks: that it has none of the options that go with them."""
    if not args.tasks:
        for name in ("limit", "include_path", "items", "state"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} goes with --tasks")
        return
    from ..quality.tasks import check_installed

    check_installed()
    if args.limit is not None:
        options.at_least_one(args, "limit")
    for option in ("include_path", "items"):
        if (folder := getattr(args, option)) and not Path(folder).is_dir():
            raise ValueError(f"--{option.replace('_', '-')} {folder}: no such folder")
    if args.items:
        files = [_items_file(args, setting) for setting in options.with_baseline(settings)]
        if len(set(files)) < len(files):
            raise ValueError("--items: two of the codecs and policies would write the same file; rename a policy")
        for file in files:
            output.check_file("--items", str(file))


def run(args: argparse.Namespace, settings: list[options.Setting]) -> None:
    """Stock first, then each setting, on the same items."""
    from ..quality.journal import Journal
    from ..quality.origin import digest, on_ranks
    from ..quality.tasks import Tasks, write_items

    settings = options.with_baseline(settings)
    rows = []
    with options.opened(args) as (model, tokenizer), ranks.alone(args.state):
        overrides = options.overrides(args, model, settings)
        weights = digest(args.weights) if args.weights else None
        journal = Journal(args.state, {**on_ranks(args, next(model.parameters()).dtype), "weights": weights})
        tasks = Tasks(args.tasks, args.include_path, args.limit)
        runs = tasks.run(model, tokenizer, options.trials(settings, overrides), journal, overrides)
        for setting, made in zip(settings, runs, strict=True):
            rows += _rows(setting.name, made)
            if args.items and output.is_first_rank():
                write_items(_items_file(args, setting), _header(args, setting), made.items)
    if output.is_first_rank():
        output.show(f"evaluate: {', '.join(args.tasks)}, TP={args.tp}", COLUMNS, rows)
        output.write_json(args.json, vars(args), rows)


def _rows(codec: str, made: "TaskRun") -> list[dict]:
    """One per task and metric. The harness calls a metric `acc,none` and its standard error `acc_stderr,none`."""
    sent = made.traffic.sites
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


def _items_file(args: argparse.Namespace, setting: options.Setting) -> Path:
    name = Path(setting.name).stem if setting.name in args.policy else setting.name
    return Path(args.items, re.sub(r"[^\w.-]+", "_", name) + ".jsonl")


def _header(args: argparse.Namespace, setting: options.Setting) -> dict[str, object]:
    return {
        "model": Path(args.model).name,
        "policy": str(setting.policy),
        "setting": setting.name,
        "tp": args.tp,
        "dtype": options.dtype_name(args),
        "versions": output.versions(),
        "command": shlex.join(["megatron-comp", *sys.argv[1:]]),
    }
