# SPDX-License-Identifier: Apache-2.0
"""How many ranks a launcher says that it has started."""

import os

# What torchrun sets for a rank to find the others.
NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")


def world_size() -> int | None:
    """WORLD_SIZE; None without, or with a process of its own.

    Raises ValueError for one that is left over from something else: no number, or without the rest.
    """
    if (given := os.environ.get("WORLD_SIZE")) is None:
        return None
    way_on = "Run it under torchrun, or `unset WORLD_SIZE` to start without a launcher"
    if not (given.isascii() and given.isdecimal() and int(given) >= 1):
        raise ValueError(f"the environment says WORLD_SIZE={given!r}; expected a launcher's number of ranks. {way_on}")
    if missing := [name for name in NEEDED if not os.environ.get(name)]:
        raise ValueError(f"the environment says WORLD_SIZE={given}, but not {', '.join(missing)}. {way_on}")
    rank = os.environ["RANK"]
    if not (rank.isascii() and rank.isdecimal() and int(rank) < int(given)):
        raise ValueError(f"the environment says RANK={rank!r}; allowed with WORLD_SIZE={given}: 0 to {int(given) - 1}")
    return int(given)
