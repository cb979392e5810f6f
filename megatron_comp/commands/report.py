# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp report`: one page of what other commands measured."""

import argparse
import importlib.util
from pathlib import Path

from ..launcher import output
from ..quality.bootstrap import check_scipy
from . import checks

COLUMNS = {
    "setting": ("setting", ""),
    "task": ("task", ""),
    "score": ("score", ""),
    "items": ("items", "d"),
    "accuracy_change": ("accuracy", "+.4f"),
    "to_wrong": ("to wrong", "d"),
    "to_right": ("to right", "d"),
    "mcnemar_p": ("p", ".2g"),
    "margin_change": ("lead", "+.4f"),
}
# By option: what the page lacks without it.
INPUTS = {
    "evaluate": "texts (--evaluate)",
    "items": "tasks (--items)",
    "ttft": "times to first token (--ttft)",
    "search": "the frontier of a search (--search)",
    "sensitivity": "KL by layer and site (--sensitivity)",
    "policy": "policy files (--policy)",
}


def check(args: argparse.Namespace) -> None:
    if not any(getattr(args, name) for name in INPUTS):
        raise ValueError(f"nothing to report: give at least one of {', '.join(f'--{name}' for name in INPUTS)}")
    checks.check_written(args, "out")
    check_scipy()
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("figures need matplotlib: pip install matplotlib, or this package with its extra 'plot'")


def run(args: argparse.Namespace) -> None:
    from ..report.document import Page, write
    from ..report.sections import sections

    check(args)
    inputs = _read(args)
    compared = inputs.compared()
    missing = [what for name, what in INPUTS.items() if not getattr(args, name)]
    made = sections(inputs, compared, output.command_line(), missing)
    page = Page(args.title or _title(inputs), made)
    write(page, args.out)
    if compared:
        output.show("report: answers beside the uncompressed model's", COLUMNS, compared)
        output.write_csv(args.csv, compared)
    output.write_json(args.json, vars(args), compared)
    print(f"report: wrote {args.out}" + (f"; not on it: {', '.join(missing)}" if missing else ""))


def _read(args: argparse.Namespace):
    """Raises ValueError or OSError for files that are not what the options ask for."""
    from ..policy import CompressionPolicy
    from ..quality.items import read_items
    from ..report import sources

    for path in args.policy:
        CompressionPolicy.from_file(path)
    inputs = sources.Inputs(
        evaluate=[sources.read_rows(path, "evaluate") for path in args.evaluate],
        items=_base_first([read_items(path) for path in args.items]),
        ttft=[sources.read_rows(path, "ttft") for path in args.ttft],
        search=sources.read_rows(args.search, "search") if args.search else None,
        sensitivity=sources.read_sensitivity(args.sensitivity) if args.sensitivity else None,
        policies=[(Path(path).name, Path(path).read_text(encoding="utf-8")) for path in args.policy],
    )
    return sources.with_short_names(inputs)


def _base_first(runs: list) -> list:
    """The uncompressed run before the others."""
    if not runs:
        return []
    settings = [run.setting for run in runs]
    if settings.count("none") != 1:
        raise ValueError(f"--items: exactly one file is to be of the setting none; these are of {', '.join(settings)}")
    if twice := [setting for setting in settings if settings.count(setting) > 1]:
        raise ValueError(f"--items: two files are of the setting {twice[0]}")
    return sorted(runs, key=lambda run: run.setting != "none")


def _title(inputs) -> str:
    found = [rows.config for rows in (*inputs.evaluate, *inputs.ttft) if rows.config.get("model")]
    found += [run.header for run in inputs.items]
    if not found:
        return "Compressed tensor-parallel inference"
    return f"{Path(str(found[0]['model'])).name} on {found[0].get('tp')} ranks, compressed"
