# SPDX-License-Identifier: Apache-2.0
"""The helper that starts ranks: results by rank, first failure, time limit, dead ranks, nothing left behind."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks


def add(rank, world_size, scale):
    x = torch.full((4,), float(rank)) * scale
    dist.all_reduce(x)
    return rank, os.getpid(), x


def fail(rank, world_size):
    if rank == 1:
        raise ValueError("rank one does not want to")
    dist.barrier()


def hang(rank, world_size, folder):
    (folder / str(rank)).write_text(str(os.getpid()))
    time.sleep(600)


def die(rank, world_size):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.barrier()
    except RuntimeError as error:
        return type(error).__name__
    return "no error"


def join(rank, world_size):
    dist.init_process_group("gloo", init_method="env://", timeout=timedelta(seconds=30))
    return dist.get_world_size()


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_results_come_back_by_rank():
    results = run_ranks(add, 3, torch.tensor(2.0))
    assert [rank for rank, _, _ in results] == [0, 1, 2]
    assert len({pid for _, pid, _ in results}) == 3
    for _, _, x in results:
        torch.testing.assert_close(x, torch.full((4,), 6.0))


def test_own_init():
    assert run_ranks(join, 2, init=False) == [2, 2]


def test_the_failing_rank_is_shown():
    with pytest.raises(AssertionError, match="rank 1 failed(?s:.*)rank one does not want to"):
        run_ranks(fail, 2)


def test_time_limit_kills_all(tmp_path):
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] gave no answer within 8 s"):
        run_ranks(hang, 2, tmp_path, timeout=8)
    assert all(gone(int((tmp_path / str(rank)).read_text())) for rank in range(2))


def test_dead_rank():
    with pytest.raises(AssertionError, match="rank 1 died with exit code"):
        run_ranks(die, 2)
    assert run_ranks(die, 2, may_die=(1,))[1] is None


def test_nested_functions_are_refused():
    with pytest.raises(ValueError, match="top level"):
        run_ranks(lambda rank, world_size: None, 2)
