# SPDX-License-Identifier: Apache-2.0
"""What all ranks of a group must agree on before sums are compressed: policy, version, links, and who is near whom."""

import logging
import os
import socket
from contextlib import suppress
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist

from ..policy import CompressionPolicy
from ..version import __version__
from ..wire.calibration import ASSUMED, ASSUMED_PEERS, VARIABLE, Calibration, find_calibration
from ..wire.topology import connect

logger = logging.getLogger(__name__)
_said: set[str] = set()


class _Said(NamedTuple):
    """What a rank tells the others of its group. predicted: digest of its predictors and of what they compute there."""

    version: str
    digest: str
    predicted: str
    policy: str
    problem: str | None
    host: str
    has_levels: bool


def compare_ranks(places: list, policy: CompressionPolicy, problem: str | None, predicted: str = "") -> dict:
    """By group, the names of its ranks' machines. predicted: see `_Said`.

    Raises on every rank if one of them found a problem, or if they do not all have one policy, version and digest.
    """
    said = _Said(__version__, policy.digest(), predicted, str(policy), problem, socket.gethostname(), policy.has_levels)
    heard: dict = {}
    # Every gather comes before any error, or other groups would wait for the ranks that left.
    for group in dict.fromkeys(place.group for place in places):
        everyone = [said] * group.size()
        if group.size() > 1:
            dist.all_gather_object(everyone, said, group=group)
        heard[group] = everyone
    by_level = any(each.has_levels for everyone in heard.values() for each in everyone)
    if problem:
        _refuse(problem, by_level)
    for first, *others in heard.values():
        for rank, each in enumerate(others, start=1):
            if difference := _difference(first, rank, each, policy):
                _refuse(difference, by_level)
    return {group: [each.host for each in everyone] for group, everyone in heard.items()}


def _difference(first: _Said, rank: int, said: _Said, policy: CompressionPolicy) -> str | None:
    """Why a rank cannot go on with what rank 0 said."""
    for number, each in ((0, first), (rank, said)):
        if each.problem:
            return f"rank {number}: {each.problem}"
    if (said.version, said.digest) != (first.version, first.digest):
        both = (f"rank {n}: version {each.version}, policy {each.policy}" for n, each in ((0, first), (rank, said)))
        return "compression differs between tensor-parallel ranks: " + "; ".join(both)
    if said.predicted != first.predicted:
        return (
            f"policy: predictor: {policy.predictor} predicts other bits on rank {rank} than on rank 0: their files "
            "differ, or their devices or libraries round products otherwise"
        )
    return None


def _refuse(problem: str, by_level: bool) -> NoReturn:
    """Raises ValueError.

    by_level: sums of this group were to go by level. Ranks of other groups, which found nothing wrong, then wait for
    all ranks of the job in `connect_islands`, and learn of the problem there.
    """
    if by_level:
        with suppress(ValueError):
            connect({}, problem)
    raise ValueError(problem)


def connect_islands(hosts: dict, policy: CompressionPolicy) -> dict:
    """By group, which of its ranks are near one another; none where no sum asks.

    Raises ValueError on every rank of the job if one of them found a problem, here or earlier.
    """
    if not policy.has_levels:
        return {}
    try:
        islands = {group: policy.islands_of(names) for group, names in hosts.items() if group.size() > 1}
    except ValueError as error:
        _refuse(str(error), by_level=True)
    return connect(islands)


def agree_on_calibration(hosts: dict, policy: CompressionPolicy, graphs: bool = False) -> dict:
    """By group, rank 0's calibration; what it failed with is raised on every rank of the group.

    graphs: whether sums are captured in CUDA graphs.
    """
    agreed = {}
    for group, machines in hosts.items():
        found: list[Calibration | str] = [ASSUMED]
        if group.size() > 1 and policy.predicts:
            if group.rank() == 0:
                device = "cuda" if torch.cuda.is_available() else "cpu"
                try:
                    found[0] = find_calibration(group.size(), machines, dist.get_backend(group), device, graphs)
                    if found[0] is ASSUMED and device == "cuda" and machines == 1 and reach_one_another(group.size()):
                        found[0] = ASSUMED_PEERS
                except (ValueError, OSError) as error:
                    found[0] = str(error)
            dist.broadcast_object_list(found, dist.get_global_rank(group, 0), group=group)
        agreed[group] = found[0]
    # After the last broadcast, or other groups would wait for the ranks that left.
    for group, calibration in agreed.items():
        if isinstance(calibration, str):
            _refuse(calibration, policy.has_levels)
        if group.size() > 1 and policy.predicts and group.rank() == 0:
            say_calibration(calibration, policy, group.size())
    return agreed


def reach_one_another(ranks: int) -> bool:
    """Whether so many GPUs are seen here that have access to one another's memory."""
    if torch.cuda.device_count() < ranks:
        return False
    return all(torch.cuda.can_device_access_peer(0, other) for other in range(1, ranks))


def say_calibration(calibration: Calibration, policy: CompressionPolicy, ranks: int) -> None:
    if not calibration.measured:
        level = logging.INFO if os.environ.get(VARIABLE) == "assumed" else logging.WARNING
        say_once(
            level,
            f"nothing was measured of the link between these {ranks} ranks; {calibration.source}. "
            "`megatron-comp calibrate` measures it",
        )
        return
    say_once(logging.INFO, f"sums over {ranks} ranks are predicted from {calibration.source}")
    if unknown := [str(codec) for codec in policy.codecs() if not calibration.knows(codec)]:
        say_once(
            logging.WARNING,
            f"{calibration.source} has no time of {', '.join(unknown)}, taken to be as slow as the slowest there; "
            "`megatron-comp calibrate` measures codecs of --policy or --codec",
        )


def say_once(level: int, text: str) -> None:
    """Once per process, however many models and policies it holds for."""
    if text not in _said:
        _said.add(text)
        logger.log(level, "megatron_comp: %s", text)
