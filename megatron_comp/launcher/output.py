"""Tables for people, JSON and CSV for programs."""

import csv
import io
import math
import os
import platform
import sys
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .. import files
from ..version import __version__


def is_first_rank() -> bool:
    """The rank that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def show(title: str, columns: dict[str, tuple[str, str]], rows: list[dict]) -> None:
    """Prints a table, a line a row; `columns` maps a row's keys to headings and format specs such as `.3f`.

    None is an empty field.
    """
    table = Table(title=title, title_justify="left")
    for heading, spec in columns.values():
        table.add_column(heading, justify="right" if spec else "left", no_wrap=True)
    for row in rows:
        table.add_row(*("" if row[key] is None else format(row[key], spec) for key, (_, spec) in columns.items()))
    _print(table)


def show_one(title: str, columns: dict[str, tuple[str, str]], row: dict) -> None:
    """Prints one row as a table of headings and values."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for key, (heading, spec) in columns.items():
        table.add_row(heading, format(row[key], spec))
    _print(table)


def _print(table: Table) -> None:
    console = Console()
    # Where the output is no terminal there is no width to keep to, and a table is never cut.
    with _reader_may_leave():
        (console if console.is_terminal else Console(width=500)).print(table)


def say(text: str) -> None:
    """Prints a line."""
    with _reader_may_leave():
        print(text, flush=True)


def replace_what_cannot_be_written() -> None:
    """Lets standard output write `?` for characters that its encoding lacks, instead of failing after the work."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


@contextmanager
def _reader_may_leave():
    """If whoever reads the output has left, as `head` does, the rest goes nowhere: files are still to be written."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_json(path: str | None, config: dict, rows: list[dict]) -> None:
    """One object with `config`, `versions` and `rows`, if a path is given."""
    if path is None:
        return
    # JSON knows no infinities: a perplexity that a codec has ruined is null.
    rows = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]
    content = {"config": config, "versions": versions(), "rows": rows}
    files.write_json(path, content, indent=1)


def write_csv(path: str | None, rows: list[dict]) -> None:
    """A line a row, under one of the rows' keys, if a path is given; None is an empty field."""
    if path is None:
        return
    with files.replacing(path) as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def check_file(option: str, path: str | None) -> None:
    """Raises ValueError if a file that an option names cannot be written; before hours of work, not after."""
    if path and (not Path(path).resolve().parent.is_dir() or Path(path).is_dir()):
        raise ValueError(f"{option} {path}: not a file, or its folder does not exist")


def check_resumed(option: str, path: str | None) -> None:
    """Raises ValueError if a file that a command goes on from cannot be written, or if another one is at work on it."""
    check_file(option, path)
    if path:
        try:
            files.check_free(path)
        except files.InUse as error:
            raise files.InUse(f"{option} {error}") from None


def versions() -> dict[str, str]:
    found = {"megatron_comp": __version__, "python": platform.python_version()}
    for name in ("torch", "megatron-core", "transformers", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
