# SPDX-License-Identifier: Apache-2.0
"""What all ranks must agree on before sums are compressed: policy, version, links, and who is near whom."""

import logging
import os
import socket
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..policy import CompressionPolicy
from ..version import __version__
from ..wire.calibration import ASSUMED, ASSUMED_PEERS, VARIABLE, Calibration, find_calibration
from ..wire.together import Together
from ..wire.topology import Islands, Topology, connect

Group = dist.ProcessGroup

logger = logging.getLogger(__name__)
_said: set[str] = set()


class Said(NamedTuple):
    """What a rank tells all others of what it is about to compress."""

    version: str
    policy: str
    digest: str
    predictor: str
    predicted: str
    """Digest of its predictors and of what they compute on its device."""
    host: str
    has_levels: bool
    groups: tuple[tuple[int, ...], ...]
    """The ranks of each group that it sums over, in group order."""

    @classmethod
    def of(cls, policy: CompressionPolicy, groups: list[Group], predicted: str, has_levels: bool) -> "Said":
        members = tuple(tuple(dist.get_process_group_ranks(group)) for group in groups)
        its = str(policy), policy.digest(), str(policy.predictor)
        return cls(__version__, *its, predicted, socket.gethostname(), has_levels, members)


def check_alike(everyone: Mapping[int, Said]) -> None:
    """Raises ValueError, the same one on every rank, if ranks that sum together are about to do different things.

    everyone: what each rank said, by its number in the job.
    """
    for ranks in sorted({ranks for said in everyone.values() for ranks in said.groups}):
        if absent := [rank for rank in ranks if rank not in everyone]:
            raise ValueError(f"rank {absent[0]} sums with others of the model, but is not in the group that was given")
        first = everyone[ranks[0]]
        for rank in ranks[1:]:
            said = everyone[rank]
            if (said.version, said.digest) != (first.version, first.digest):
                both = ((ranks[0], first), (rank, said))
                words = (f"rank {number}: version {each.version}, policy {each.policy}" for number, each in both)
                raise ValueError("compression differs between tensor-parallel ranks: " + "; ".join(words))
            if said.predicted != first.predicted:
                raise ValueError(
                    f"policy: predictor: {first.predictor} predicts other bits on rank {rank} than on rank "
                    f"{ranks[0]}: their files differ, or their devices or libraries round products otherwise"
                )


def agree_on_links(
    groups: list[Group],
    everyone: Mapping[int, Said],
    policy: CompressionPolicy,
    graphs: bool,
    together: Group | None = None,
) -> tuple[dict[Group, Calibration], dict[Group | None, Topology]]:
    """By group, its rank 0's calibration, and which of its ranks are near one another where sums may ask.

    graphs: sums are captured in CUDA graphs. together: the ranks that call this, by default all of the job; sums go by
    level only then.

    Raises ValueError, on every rank if on one, for a calibration file that cannot be used, and for islands that do not
    fit a group; OSError if no rank can read its file.
    """
    members = {group: tuple(dist.get_process_group_ranks(group)) for group in groups if group.size() > 1}
    hosts = {group: [everyone[rank].host for rank in ranks] for group, ranks in members.items()}
    with Together(together) as step:
        islands: dict[Group | None, Islands] = {}
        if policy.has_levels and together is None:
            islands |= {group: policy.islands_of(names) for group, names in hosts.items()}
        step.say(
            {
                ranks: _find_calibration(group, len(set(hosts[group])), graphs)
                for group, ranks in members.items()
                if policy.predicts and group.rank() == 0
            }
        )
    found = {group: step.everyone[ranks[0]].get(ranks, ASSUMED) for group, ranks in members.items()}
    for group, calibration in found.items():
        if policy.predicts and group.rank() == 0:
            say_calibration(calibration, policy, group.size())
    # torch.distributed makes sub-groups on all ranks of the job: also on those of other groups, if one asks.
    topologies = connect(islands) if any(said.has_levels for said in everyone.values()) else {}
    return {group: found.get(group, ASSUMED) for group in groups}, topologies


def _find_calibration(group: Group, machines: int, graphs: bool) -> Calibration:
    """What this rank knows of the link between the ranks of a group."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = find_calibration(group.size(), machines, dist.get_backend(group), device, graphs)
    if found is ASSUMED and device == "cuda" and machines == 1 and reach_one_another(group.size()):
        return ASSUMED_PEERS
    return found


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
