# SPDX-License-Identifier: Apache-2.0
"""How many ranks a launcher says that it has started."""

import os
import socket

# What torchrun sets for a rank to find the others.
NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")


def world_size() -> int | None:
    """WORLD_SIZE; None without, or with a process of its own.

    Raises ValueError for one that is left over from something else: no number, or without the rest; and for a network
    interface that is not there.
    """
    _check_interfaces("GLOO_SOCKET_IFNAME")
    if (given := os.environ.get("WORLD_SIZE")) is None:
        return None
    way_on = "Run it under torchrun, or `unset WORLD_SIZE` to start without a launcher"
    if not (given.isascii() and given.isdecimal() and int(given) >= 1):
        raise ValueError(f"the environment says WORLD_SIZE={given!r}; expected a launcher's number of ranks. {way_on}")
    if missing := [name for name in NEEDED if not os.environ.get(name, "").strip()]:
        raise ValueError(f"the environment says WORLD_SIZE={given}, but not {', '.join(missing)}. {way_on}")
    _check_number("RANK", int(given) - 1, f" with WORLD_SIZE={given}")
    _check_number("LOCAL_RANK", int(given) - 1, f" with WORLD_SIZE={given}")
    _check_number("MASTER_PORT", 65535)
    return int(given)


def _check_interfaces(name: str) -> None:
    """Raises ValueError for a variable that names a network interface which is not there."""
    there = [interface for _, interface in socket.if_nameindex()]
    if absent := [each for each in os.environ.get(name, "").split(",") if each and each not in there]:
        raise ValueError(
            f"the environment says {name}={os.environ[name]}; {absent[0]} is not one of {', '.join(there)}"
        )


def _check_number(name: str, most: int, with_what: str = "") -> None:
    """Raises ValueError for a variable that is set, but to no number from 0 to `most`."""
    value = os.environ.get(name)
    if value is not None and not (value.isascii() and value.isdecimal() and int(value) <= most):
        raise ValueError(f"the environment says {name}={value!r}; allowed{with_what}: 0 to {most}")
