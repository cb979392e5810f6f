# SPDX-License-Identifier: Apache-2.0
"""The link that ranks run on, and the time of the slowest of them."""

import os

import torch
import torch.distributed as dist

from ..launcher import network


def here() -> str:
    """What the link of this rank is called."""
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    return os.environ.get(network.LINK, "local" if one_machine else "network")


def bytes_per_second() -> float | None:
    """Of the slowest link between the ranks, if its rate is known."""
    rate = network.slowest_rate(os.environ.get(network.LINK, network.UNSHAPED))
    return rate and rate / 8


def slowest(seconds: list[list], device: torch.device) -> list[list]:
    """Nested lists, of the longest over all ranks in each place: a call lasts until its last rank is done."""
    longest = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return longest.tolist()
