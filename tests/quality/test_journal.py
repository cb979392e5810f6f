# SPDX-License-Identifier: Apache-2.0
import json
import os

import torch.distributed as dist
from ranks import run_ranks

from megatron_comp.quality.journal import Journal


def kept_by_ranks(rank, world_size, path):
    """What each rank returns and reads again if all keep entries of their own."""
    journal = Journal(path, {"tp": world_size, "shape": (1, 2)})
    kept = [journal.keep("entries", {f"p{n}": {"kl": rank + n / 3}}) for n in range(2)]
    journal.keep("sums", {"windows": 1, "rows": [rank]})
    again = Journal(path, {"tp": world_size, "shape": (1, 2)})
    return kept, journal.continued, again.continued, again["entries"], again["sums"], again["other"]


def test_ranks_know_what_the_first_has_kept(tmp_path):
    path = str(tmp_path / "state")
    for kept, continued, continued_again, points, sums, other in run_ranks(kept_by_ranks, 2, path):
        assert kept == [{"p0": {"kl": 0.0}}, {"p1": {"kl": 1 / 3}}] and points == kept[0] | kept[1]
        assert (continued, continued_again, sums, other) == (False, True, {"windows": 1, "rows": [0]}, {})
    assert json.loads((tmp_path / "state").read_text())["settings"] == {"tp": 2, "shape": [1, 2]}
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def refusals(rank, world_size, path):
    Journal(path, {"a": 1, "b": 3}).keep("entries", {"x": {"kl": 1.0}})
    said = []
    for settings in ({"a": 2, "b": 3}, {"a": 1, "b": 3}):
        try:
            Journal(path, settings)
        except ValueError as error:
            said.append(str(error))
        if rank == 0:
            os.truncate(path, 5)
        dist.barrier()
    return said


def test_a_file_of_another_run_is_refused_on_every_rank(tmp_path):
    for other, damaged in run_ranks(refusals, 2, str(tmp_path / "state")):
        assert "is of another run: it has a 1, not 2. Name another file" in other and "is not a state" in damaged


def in_memory(rank, world_size):
    journal = Journal(None, {})
    journal.keep("points", {"x": {"rank": rank}})
    return journal["points"], journal.continued


def test_without_a_file_it_is_kept_in_memory():
    assert run_ranks(in_memory, 2) == [({"x": {"rank": 0}}, False)] * 2
