# SPDX-License-Identifier: Apache-2.0
"""Benches of several ranks: the links that they run on, one after another, and their rows on the way to one table."""

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from .. import files
from ..launcher import network, output, ranks

# The file in which ranks leave their rows for the process that started them.
_ROWS = "MEGATRON_COMP_ROWS"


class Start(NamedTuple):
    """So many ranks, and what stands behind the command's own options for them."""

    ranks: int
    options: Sequence[str] = ()


Report = Callable[[argparse.Namespace, list[dict], list[dict], dict], None]


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for a rate that is not valid, and for links beside ranks that a launcher has started."""
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
    if args.link and "WORLD_SIZE" in os.environ and not started_here():
        raise ValueError(
            "--link starts ranks of its own, on this machine: leave out torchrun, or leave out --link and start this "
            "with launch/slow_network.sh"
        )


def start(args: argparse.Namespace, argv: list[str], starts: Sequence[Start], report: Report) -> int:
    """Runs this command over each link in turn, once per start; 0, or the status of the ranks that failed.

    starts: the first one's ranks are shared out evenly over the machines; others fill machine after machine.

    report(args, rows, new, circumstances): called after every start with all rows so far and those of this start, so
    that a run that is cut short leaves what it has measured.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="megatron-comp-") as folder:
        file = Path(folder, "rows.json")
        for link, (count, more) in itertools.product(args.link or [None], starts):
            command = [sys.executable, "-m", "megatron_comp.cli", *argv, *more]
            network_of_ranks = _network(args, starts[0].ranks, count, link)
            if status := ranks.start(count, command, network_of_ranks, **{_ROWS: str(file)}):
                return status
            made = json.loads(file.read_text())
            rows += made["rows"]
            report(args, rows, made["rows"], made["circumstances"])
    return 0


def _network(args: argparse.Namespace, most: int, count: int, link: str | None) -> network.Network | None:
    """Of `count` ranks, on machines that `most` ranks fill evenly. Raises ValueError where they cannot."""
    if link is None:
        return None
    machines = most if args.machines is None else args.machines
    if machines < 1 or most % machines:
        raise ValueError(f"--machines {machines}: {most} ranks cannot be shared out evenly")
    each = most // machines
    filled, rest = divmod(count, each)
    used = [each] * filled + [rest] * (rest > 0)
    rates = link.split(",")
    return network.Network(used, ",".join(rates[: len(used)]), args.rtt)


def started_here() -> bool:
    """Whether this process is a rank that `start` started."""
    return _ROWS in os.environ


def hand_over(args: argparse.Namespace, rows: list[dict], circumstances: dict, report: Report) -> None:
    """On a rank that has measured: to `start`, or, where another launcher started the ranks, reported by the first."""
    if not output.is_first_rank():
        return
    if file := os.environ.get(_ROWS):
        files.write_json(file, {"rows": rows, "circumstances": circumstances})
    else:
        report(args, rows, rows, circumstances)
