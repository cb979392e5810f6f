# SPDX-License-Identifier: Apache-2.0
"""Several tensor-parallel groups in one job: what one refuses all ranks refuse, and groups may differ."""

import os

import torch.distributed as dist
from models import message_of, policy
from ranks import run_ranks

from megatron_comp.layers.agreement import Said, agree_on_links, check_alike
from megatron_comp.wire.together import Together

BY_LEVEL = {"algorithm": "hierarchical", "islands": 1}


def agree(group, words, problem=None, together=None):
    """The islands of this rank's group, as `apply_compression` finds them."""
    its = policy(**words)
    with Together(together) as step:
        if problem:
            raise ValueError(problem)
        step.say(Said.of(its, [group], "", its.has_levels and together is None))
    check_alike(step.everyone)
    topologies = agree_on_links([group], step.everyone, its, False, together)[1]
    return [each.islands.members for each in topologies.values()]


def of_two_groups(rank, world_size, calibration):
    """What each rank of two groups of two says of what is wrong in the second alone, and what groups that differ do."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group, second = groups[rank // 2], rank > 1
    said = [message_of(agree, group, BY_LEVEL, "a layer is missing" if rank == 2 else None)]
    said.append(message_of(agree, group, BY_LEVEL if rank != 3 else {"algorithm": "two_step"}))
    said.append(message_of(agree, group, BY_LEVEL | ({"islands": [[0, 1, 2]]} if second else {})))
    if second:
        os.environ["MEGATRON_COMP_CALIBRATION"] = str(calibration)
    said.append(message_of(agree, group, {"algorithm": "auto", "min_bytes": "auto"}))
    os.environ["MEGATRON_COMP_CALIBRATION"] = "assumed"
    if second:  # which the other group takes no part in
        said.append(message_of(agree, group, {"codec": "mxfp4"}, "a layer is missing" if rank == 3 else None, group))
        said.append(message_of(agree, dist.group.WORLD, {"codec": "mxfp4"}, together=group))
        assert agree(group, {"codec": "mxfp4"}, None, group) == []
    else:
        said += ["", ""]
    return said, agree(group, BY_LEVEL if second else {"algorithm": "two_step"}), agree(group, BY_LEVEL)


def test_groups_of_one_job(tmp_path):
    results = run_ranks(of_two_groups, 4, tmp_path / "none.yaml")
    missing, differs, misfit, lost, alone, absent = zip(*(said for said, _, _ in results), strict=True)
    assert set(missing) == {"rank 2: a layer is missing"}
    assert len(set(differs)) == 1 and differs[0].startswith("compression differs between tensor-parallel ranks: rank 2")
    assert set(misfit) == {"rank 2: policy: islands: [[0, 1, 2]] are of 3 ranks, the group is of 2"}
    assert len(set(lost)) == 1 and lost[0].startswith("rank 2: calibration file ") and "none.yaml" in lost[0]
    assert alone == ("", "", *["rank 3: a layer is missing"] * 2)
    assert absent[2] == absent[3] == "rank 0 sums with others of the model, but is not in the group that was given"
    assert [some for _, some, _ in results] == [[], [], [((0,), (1,))], [((0,), (1,))]], "one group asks for levels"
    assert [found for _, _, found in results] == [[((0,), (1,))]] * 4, "all ranks are at one place after it"
