# SPDX-License-Identifier: Apache-2.0
"""Tables for people, JSON and CSV for programs."""

import csv
import errno
import importlib.util
import math
import os
import platform
import shlex
import sys
import tempfile
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from .. import files
from ..version import __version__

WIDE = 1000  # columns, where nothing bounds them


def is_first_rank() -> bool:
    """The rank that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def show(title: str, columns: dict[str, tuple[str, str]], rows: list[dict]) -> None:
    """Prints a table, a line per row; `columns` maps a row's keys to headings and format specs such as `.3f`.

    None is an empty field. In a terminal that is too narrow the table is turned, or has a table per row: no field is
    ever cut.
    """
    table = Table(title=title, title_justify="left")
    for heading, spec in columns.values():
        table.add_column(heading, justify="right" if spec else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(_field(row, key, spec) for key, (_, spec) in columns.items()))
    console = _console()
    if _width(table) <= console.width:
        _print(console, table)
    elif _width(turned := _turned(title, columns, rows)) <= console.width:
        _print(console, turned)
    else:
        for row in rows:
            _print(console, _turned(title, columns, [row]))


def show_one(title: str, columns: dict[str, tuple[str, str]], row: dict) -> None:
    """Prints one row as a table of headings and values."""
    _print(_console(), _turned(title, columns, [row]))


def _turned(title: str, columns: dict[str, tuple[str, str]], rows: list[dict]) -> Table:
    """A line per heading, a column per row."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    for _ in rows:
        table.add_column(justify="right", no_wrap=True)
    for key, (heading, spec) in columns.items():
        table.add_row(heading, *(_field(row, key, spec) for row in rows))
    return table


def _field(row: dict, key: str, spec: str) -> str:
    return "" if row[key] is None else format(row[key], spec)


def with_interval(row: dict, key: str, spec: str) -> str | None:
    """`row[key]` with its interval in brackets, where `<key>_low` and `<key>_high` have one that is more than a point.

    None for None.
    """
    if row[key] is None:
        return None
    ends = [row.get(f"{key}_{end}") for end in ("low", "high")]
    said = format(row[key], spec)
    return said if None in ends or ends[0] == ends[1] else f"{said} ({' to '.join(format(end, spec) for end in ends)})"


def _console() -> Console:
    """Where the output is no terminal there is no width to keep to."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


def _width(table: Table) -> int:
    """Columns that a table takes if nothing of it is cut."""
    wide = Console(width=WIDE)
    return Measurement.get(wide, wide.options, table).maximum


def _print(console: Console, table: Table) -> None:
    console.width = max(console.width, _width(table))  # wrapped by the terminal rather than cut
    with _reader_may_leave():
        console.print(table)


def say(text: str) -> None:
    """Prints a line."""
    with _reader_may_leave():
        print(text, flush=True)


@contextmanager
def _reader_may_leave():
    """If whoever reads the output has left, as `head` does, the rest goes nowhere: files are still to be written."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command_line() -> str:
    """What was typed, for a shell."""
    return shlex.join(["megatron-comp", *sys.argv[1:]])


def write_json(path: str | None, config: dict, rows: list[dict]) -> None:
    """One object with `command`, `config`, `versions` and `rows`, if a path is given."""
    if path is None:
        return
    # JSON knows no infinities: a perplexity that a codec has ruined is null.
    rows = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]
    content = {"command": command_line(), "config": config, "versions": versions(), "rows": rows}
    files.write_json(path, content, indent=1)


def write_csv(path: str | None, rows: list[dict]) -> None:
    """One line per row, under one of the rows' keys, if a path is given; None is an empty field."""
    if path is None:
        return
    with files.replacing(path) as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def check_file(option: str, path: str | None) -> None:
    """Raises ValueError if a file that an option names cannot be written; before hours of work, not after."""
    if path is None:
        return
    if option == "--figure" and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--figure needs matplotlib: pip install matplotlib, or this package with its extra 'plot'")
    try:
        target = Path(path).resolve()
        if not path or not target.parent.is_dir() or target.is_dir():
            raise ValueError("not a file, or its folder does not exist")
        if not target.exists() or target.is_file():  # else a device or a pipe, which is written in place
            with tempfile.TemporaryFile(dir=target.parent):
                pass
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot be written: {error.strerror}") from None
    except ValueError as error:  # a name with a null byte, too
        raise ValueError(f"{option} {path}: {error}") from None
    if target.exists() and not os.access(target, os.W_OK):
        raise ValueError(f"{option} {path}: cannot be written: {os.strerror(errno.EACCES)}")


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
