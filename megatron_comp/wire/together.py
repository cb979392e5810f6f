# SPDX-License-Identifier: Apache-2.0
"""Work that succeeds on all ranks, or fails on all of them with one error."""

import os
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..notices import one_line


class _Heard(NamedTuple):
    """What a rank tells all others. problem: one line; None if its work is done."""

    said: Any
    problem: str | None


class Together:
    """A step that the ranks of a group, by default all of the job, do at the same time:

        with Together() as step:
            policy = CompressionPolicy.from_file(path)
            step.say(policy.digest())
        compare(step.everyone)          # what was said, by rank of the job

    An error of one rank would leave the others to wait in the next collective. Here they learn of it at the end of the
    block: if every rank has the same error, each raises its own; else all raise a ValueError that begins with the
    number of the first rank that has one. Without torch.distributed this is the only rank.

    What is not an `Exception`, as KeyboardInterrupt, ends this rank alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.everyone: dict[int, Any] = {}
        self._group = group
        self._said: Any = None

    def say(self, value: object) -> None:
        """What the other ranks get; it is pickled."""
        self._said = value

    def __enter__(self) -> "Together":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and not isinstance(error, Exception):
            return
        mine = _Heard(self._said, None if error is None else one_line(error))
        ranks = dist.get_process_group_ranks(self._group) if dist.is_initialized() else [0]
        heard = [mine] * len(ranks)
        if len(ranks) > 1:
            dist.all_gather_object(heard, mine, group=self._group)
        if len({each.problem for each in heard}) > 1:
            rank, problem = next((rank, each.problem) for rank, each in zip(ranks, heard, strict=True) if each.problem)
            raise ValueError(f"rank {rank}: {problem}") from error
        self.everyone = {rank: each.said for rank, each in zip(ranks, heard, strict=True)}


def join_job(timeout: timedelta, failed: Exception | None = None) -> None:
    """Starts torch.distributed on the ranks that a launcher started (`env://`), each on the GPU of its number if any.

    failed: why this rank cannot go on; all ranks then raise, as at the end of `Together`.
    """
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group(backend, init_method="env://", timeout=timeout)
    with Together():
        if failed:
            raise failed
