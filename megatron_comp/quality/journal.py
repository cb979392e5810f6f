# SPDX-License-Identifier: Apache-2.0
"""What a command has measured so far, in a file from which it goes on after an interruption."""

import json
from pathlib import Path

import torch.distributed as dist

from ..files import read_json, shown, write_json

# Numbers of every point, see `judge.py`.
MEASURED = ("bits_per_value", "kl", "nll", "base_nll", "top1_agreement")


class Journal:
    """Named parts of a JSON file, each a dictionary: `journal["points"]`. JSON keeps each float to the last bit.

    Rank 0 reads and writes the file; what it knows is what all ranks know, so that all take the same way.
    """

    def __init__(self, path: str | None, settings: dict) -> None:
        """path: None keeps everything in memory. settings: all that the measurements depend on.

        Raises ValueError, on every rank, if the file is not a journal or was written with other settings.
        """
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self._parts: dict[str, dict] = {}
        found = of_first_rank(self._read() if dist.get_rank() == 0 else None)
        if isinstance(found, str):
            raise ValueError(found)
        self.continued = found is not None
        if self.continued:
            self._parts = found

    def __getitem__(self, part: str) -> dict:
        """What is known of a part; empty at first."""
        return self._parts.get(part) or {}

    def keep(self, part: str, entries: dict) -> dict:
        """Adds rank 0's entries to a part, writes the file, and returns these entries on all ranks.

        Ranks that differed by a rounding would go different ways.
        """
        entries = of_first_rank(entries)
        self._parts[part] = self[part] | entries
        if self.path and dist.get_rank() == 0:
            write_json(self.path, {"settings": self.settings, **self._parts})
        return entries

    def _read(self) -> dict | str | None:
        """The parts in the file, None without one, or what is wrong with it."""
        if self.path is None or not Path(self.path).exists():
            return None
        try:
            content = read_json(self.path, "--state")
            settings = dict(content.pop("settings"))
            _check(content)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            return f"--state {self.path} is not a state of this command: {error!r}"
        if other := [key for key in {**self.settings, **settings} if self.settings.get(key) != settings.get(key)]:
            pairs = [(key, shown(settings.get(key)), shown(self.settings.get(key))) for key in other[:8]]
            what = "; ".join(f"{key} {theirs}, not {ours}" for key, theirs, ours in pairs)
            return f"--state {self.path} is of another run: it has {what}. Name another file, or remove it"
        return content


def _check(parts: dict) -> None:
    """Raises ValueError for what no command writes: a file may have been edited, or be of another program."""
    for part, entries in parts.items():
        if not isinstance(entries, dict):
            raise ValueError(f"{shown(part)} does not hold entries by name")
    for name, point in parts.get("points", {}).items():
        if not isinstance(point, dict) or not all(isinstance(point.get(key), (int, float)) for key in MEASURED):
            raise ValueError(f"point {shown(name)} lacks a number of {', '.join(MEASURED)}")
    if seen := parts.get("sensitivity"):
        rows = seen.get("rows")
        if not isinstance(seen.get("windows"), int) or not isinstance(rows, list) or not all(map(_is_row, rows)):
            raise ValueError("sensitivity is not a number of windows and rows")


def _is_row(row: object) -> bool:
    return isinstance(row, dict)


def of_first_rank(known: object) -> object:
    """What rank 0 passes, on every rank; it is pickled on its way."""
    everybodys = [known]
    dist.broadcast_object_list(everybodys, 0)
    return everybodys[0]
