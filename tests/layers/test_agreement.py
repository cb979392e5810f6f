# SPDX-License-Identifier: Apache-2.0
"""Refusals reach every rank that would wait: those of the group, and where sums may go by level those of the job."""

import os
from types import SimpleNamespace

import torch.distributed as dist
from models import message_of, policy
from ranks import run_ranks

from megatron_comp.layers.agreement import agree_on_calibration, compare_ranks, connect_islands

BY_LEVEL = {"algorithm": "hierarchical"}


def refused(rank, world_size, calibration):
    """What each of two groups of two says of what is wrong in the second alone."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = groups[rank // 2]

    def agree(words, problem=None):
        its = policy(**words)
        hosts = compare_ranks([SimpleNamespace(group=group)], its, problem)
        agree_on_calibration({group: len(set(names)) for group, names in hosts.items()}, its)
        return connect_islands(hosts, its)

    said = [message_of(agree, BY_LEVEL, "a layer is missing" if rank == 2 else None)]
    said.append(message_of(agree, BY_LEVEL if rank != 3 else {"algorithm": "two_step"}))
    said.append(message_of(agree, BY_LEVEL | {"islands": [[0], [1]] if rank < 2 else [[0, 1, 2]]}))
    if rank > 1:
        os.environ["MEGATRON_COMP_CALIBRATION"] = str(calibration)
    said.append(message_of(agree, {"algorithm": "auto", "min_bytes": "auto"}))
    os.environ["MEGATRON_COMP_CALIBRATION"] = "assumed"
    return said, agree(BY_LEVEL)[group].islands.members


def test_what_one_group_refuses_all_ranks_refuse(tmp_path):
    missing, differs = "a layer is missing", "compression differs between tensor-parallel ranks"
    expected = [(missing, differs, "are of 3 ranks", "none.yaml")] * 4
    for words, (said, islands) in zip(expected, run_ranks(refused, 4, tmp_path / "none.yaml"), strict=True):
        assert all(word in sentence for word, sentence in zip(words, said, strict=True)), said
        assert islands == ((0, 1),), "what comes after finds all ranks at one place"
