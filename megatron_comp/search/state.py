"""What a search has measured so far, in a file from which it goes on after an interruption.

Rank 0 reads and writes the file; what it knows is what all ranks know, so that all take the same way.
"""

import json
from pathlib import Path

import torch.distributed as dist

from .. import files
from ..files import shown

MEASURED = ("bits_per_value", "kl", "nll", "base_nll", "top1_agreement")


class State:
    """`seen`: the sensitivities' sums, and by name every measured point. JSON keeps each float to the last bit."""

    def __init__(self, path: str | None, settings: dict) -> None:
        """settings: all that the measurements depend on.

        Raises ValueError, on every rank, if the file is no state or one of other settings.
        """
        self.path, self.settings = path, settings
        self.continued = False
        self.seen: dict = {"sensitivity": None, "points": {}}
        found = [None]
        if dist.get_rank() == 0:
            found[0] = self._read()
        dist.broadcast_object_list(found, 0)
        if isinstance(found[0], str):
            raise ValueError(found[0])
        if found[0] is not None:
            self.seen, self.continued = found[0], True

    def _read(self) -> dict | str | None:
        """What the file holds, None without one, or what is wrong with it."""
        if self.path is None or not Path(self.path).exists():
            return None
        try:
            content = files.read_json(self.path, "--state")
            settings, seen = content["settings"], {key: content[key] for key in self.seen}
            _check(settings, seen)
        except (OSError, ValueError, TypeError, KeyError) as error:
            return f"--state {self.path} is not the state of a search: {error!r}"
        ours = json.loads(json.dumps(self.settings))
        if other := [key for key in {**ours, **settings} if ours.get(key) != settings.get(key)]:
            what = "; ".join(f"{key} {shown(settings.get(key))}, not {shown(ours.get(key))}" for key in other[:8])
            return f"--state {self.path} is of another search: it has {what}. Name another file, or remove it"
        return seen

    def save(self) -> None:
        """An interruption leaves the file as it was or as it will be, never half of it."""
        if self.path is None or dist.get_rank() != 0:
            return
        files.write_json(self.path, {"settings": self.settings, **self.seen})


def _check(settings: object, seen: dict) -> None:
    """Raises ValueError if something in a file of a search is not of the type that a search writes."""
    sensitivity, points = seen["sensitivity"], seen["points"]
    if not isinstance(settings, dict) or not isinstance(points, dict):
        raise ValueError("settings and points are no mappings")
    if sensitivity is not None and not (
        isinstance(sensitivity, dict)
        and isinstance(sensitivity.get("windows"), int)
        and isinstance(sensitivity.get("rows"), list)
        and all(isinstance(row, dict) for row in sensitivity["rows"])
    ):
        raise ValueError("sensitivity is not a number of windows and rows")
    for name, point in points.items():
        if not isinstance(point, dict) or not all(isinstance(point.get(key), (int, float)) for key in MEASURED):
            raise ValueError(f"point {shown(name)} lacks a number of {', '.join(MEASURED)}")
