# SPDX-License-Identifier: Apache-2.0
"""What all ranks of a group must agree on before sums are compressed: policy, version, links, and who is near whom."""

import logging
import os
import socket

import torch
import torch.distributed as dist

from ..policy import CompressionPolicy
from ..version import __version__
from ..wire.calibration import ASSUMED, ASSUMED_PEERS, VARIABLE, Calibration, find_calibration
from ..wire.topology import connect

logger = logging.getLogger(__name__)
_said: set[str] = set()


def compare_ranks(places: list, policy: CompressionPolicy, problem: str | None, predicted: str = "") -> dict:
    """By group, the names of its ranks' machines. predicted: digest of the predictors and of what they compute here.

    Raises on every rank if one of them found a problem, or if they do not all have one policy, version and digest.
    """
    said, heard = (__version__, policy.digest(), predicted, str(policy), problem, socket.gethostname()), {}
    # Every gather comes before any error, or other groups would wait for the ranks that left.
    for group in dict.fromkeys(place.group for place in places):
        everyone = [said] * group.size()
        if group.size() > 1:
            dist.all_gather_object(everyone, said, group=group)
        heard[group] = everyone
    if problem:
        raise ValueError(problem)
    for everyone in heard.values():
        for rank, (version, digest, its_prediction, *_, its_problem, _host) in enumerate(everyone):
            if its_problem:
                raise ValueError(f"rank {rank}: {its_problem}")
            if (version, digest) != everyone[0][:2]:
                raise ValueError(
                    "compression differs between tensor-parallel ranks: "
                    + "; ".join(f"rank {r}: version {everyone[r][0]}, policy {everyone[r][3]}" for r in (0, rank))
                )
            if its_prediction != everyone[0][2]:
                raise ValueError(
                    f"policy: predictor: {policy.predictor} predicts other bits on rank {rank} than on rank 0: their "
                    "files differ, or their devices or libraries round products otherwise"
                )
    return {group: [host for *_, host in everyone] for group, everyone in heard.items()}


def connect_islands(hosts: dict, policy: CompressionPolicy) -> dict:
    """By group, which of its ranks are near one another; none where no sum asks."""
    if not policy.has_levels:
        return {}
    return connect({group: policy.islands_of(names) for group, names in hosts.items() if group.size() > 1})


def agree_on_calibration(hosts: dict, policy: CompressionPolicy) -> dict:
    """By group, rank 0's calibration; what it failed with is raised on every rank of the group."""
    agreed = {}
    for group, machines in hosts.items():
        found: list[Calibration | str] = [ASSUMED]
        if group.size() > 1 and policy.predicts:
            if group.rank() == 0:
                device = "cuda" if torch.cuda.is_available() else "cpu"
                try:
                    found[0] = find_calibration(group.size(), machines, dist.get_backend(group), device)
                    if found[0] is ASSUMED and device == "cuda" and machines == 1 and reach_one_another(group.size()):
                        found[0] = ASSUMED_PEERS
                except (ValueError, OSError) as error:
                    found[0] = str(error)
            dist.broadcast_object_list(found, dist.get_global_rank(group, 0), group=group)
        agreed[group] = found[0]
    # After the last broadcast, or other groups would wait for the ranks that left.
    for group, calibration in agreed.items():
        if isinstance(calibration, str):
            raise ValueError(calibration)
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
