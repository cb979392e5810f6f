"""What a search has measured so far, in a file from which it goes on after an interruption.

Rank 0 reads and writes the file; what it knows is what all ranks know, so that all take the same way.
"""

import json
import os
from pathlib import Path

import torch.distributed as dist


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
            content = json.loads(Path(self.path).read_text())
            settings, seen = content["settings"], {key: content[key] for key in self.seen}
        except (OSError, ValueError, TypeError, KeyError) as error:
            return f"--state {self.path} is not the state of a search: {error!r}"
        ours = json.loads(json.dumps(self.settings))
        if other := [key for key in {**ours, **settings} if ours.get(key) != settings.get(key)]:
            what = "; ".join(f"{key} {settings.get(key)!r}, not {ours.get(key)!r}" for key in other)
            return f"--state {self.path} is of another search: it has {what}. Name another file, or remove it"
        return seen

    def save(self) -> None:
        """An interruption leaves the file as it was or as it will be, never half of it."""
        if self.path is None or dist.get_rank() != 0:
            return
        partial = Path(f"{self.path}.partial")
        partial.write_text(json.dumps({"settings": self.settings, **self.seen}) + "\n")
        os.replace(partial, self.path)
