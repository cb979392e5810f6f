# SPDX-License-Identifier: Apache-2.0
"""Benches of several ranks: the links that they run on, one after another, and their rows on the way to one table."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from .. import files
from ..launcher import network, output, ranks

# The file in which ranks leave their rows for the process that started them.
_ROWS = "MEGATRON_COMP_ROWS"

Report = Callable[[argparse.Namespace, list[dict], list[dict], dict], None]


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for a rate that is none, and for links that cannot be made because the ranks stand already."""
    for name, given, read in (
        *(("--link", rate, network.slowest_rate) for rate in args.link or []),
        ("--rtt", args.rtt, network.seconds_of),
    ):
        try:
            read(given)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
    if not args.link and (args.machines is not None or args.rtt != "0"):
        raise ValueError("--machines and --rtt are of the network that --link makes: give its rate")
    if args.link and "WORLD_SIZE" in os.environ and _ROWS not in os.environ:
        raise ValueError(
            "--link starts ranks of its own, on this machine: leave out torchrun, or leave out --link and start this "
            "with launch/slow_network.sh"
        )


def start(args: argparse.Namespace, argv: list[str], count: int, report: Report) -> int:
    """Runs this command on `count` ranks over each link in turn; 0, or the status of the ranks that failed.

    report(args, rows, new, circumstances): called after every link with all rows so far and those of this link, so
    that a run that is cut short leaves what it has measured.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="megatron-comp-") as folder:
        file = Path(folder, "rows.json")
        command = [sys.executable, "-m", "megatron_comp.cli", *argv]
        for link in args.link or [None]:
            if status := ranks.start(count, command, _network(args, count, link), **{_ROWS: str(file)}):
                return status
            made = json.loads(file.read_text())
            rows += made["rows"]
            report(args, rows, made["rows"], made["circumstances"])
    return 0


def _network(args: argparse.Namespace, count: int, link: str | None) -> network.Network | None:
    """Raises ValueError where the machines cannot have as many ranks each."""
    if link is None:
        return None
    machines = count if args.machines is None else args.machines
    if machines < 1 or count % machines:
        raise ValueError(f"--machines {machines}: {count} ranks cannot be shared out evenly")
    return network.Network([count // machines] * machines, link, args.rtt)


def hand_over(args: argparse.Namespace, rows: list[dict], circumstances: dict, report: Report) -> None:
    """On a rank that has measured: to `start`, or, where another launcher started the ranks, reported by the first."""
    if not output.is_first_rank():
        return
    if file := os.environ.get(_ROWS):
        files.write_json(file, {"rows": rows, "circumstances": circumstances})
    else:
        report(args, rows, rows, circumstances)
