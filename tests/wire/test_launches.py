# SPDX-License-Identifier: Apache-2.0
"""What a sum costs a GPU: kernel launches, collectives, and nothing beside them. Counted on tensors without data."""

import functools
import itertools
import math
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_comp.wire import codec as codecs
from megatron_comp.wire import gpu
from megatron_comp.wire.collectives import all_reduce, reduce_scatter
from megatron_comp.wire.topology import Islands, connect

LAUNCHERS = ("_encode", "_sum_encode", "_decode_sum", "_decode_sum_encode")
# Operations that neither launch a kernel nor wait for a device.
FREE = {
    "empty",
    "new_empty",
    "view",
    "split_with_sizes",
    "split",
    "slice",
    "unsqueeze",
    "detach",
    "select",
    "_unsafe_view",
}
GROUPS = [2, 3, 8, 16]
ROWS = [1, 5, 16, 1000]  # of them some leave ranks without a row, and most do not divide
CODECS = ["mxfp4", "nvfp4", "int4:32:fp16:hadamard", "flash-int4", "mxfp4>int8:32:fp16"]


class Recorder(TorchDispatchMode):
    """Counts launches of our kernels, collectives, and every other operation that is not free."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def launcher(self, *args):
        self.counts["launch"] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if function.namespace == "c10d":
            self.counts["collective"] += 1
        elif name not in FREE:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def count(call):
    """(counts, shape) of a call that returns a tensor."""
    with Recorder() as recorder:
        for launcher in LAUNCHERS:
            setattr(gpu, launcher, recorder.launcher)
        y = call()
    return dict(recorder.counts), tuple(y.shape)


def start(rank, size):
    """As a rank of a group that is not there, on the Triton backend."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    codecs.choose_backend = lambda device_type: gpu


def counted(rank, ranks, size):
    """{case: (counts, shape)} of sums as rank 1 of a group of `size`."""
    start(1, size)
    made = {}
    for rows in ROWS:
        for codec in CODECS:
            x = torch.empty(rows, 4, 96, dtype=torch.bfloat16, device="meta")
            cases = {"two_step": lambda x=x, codec=codec: all_reduce(x, codec, None, "two_step")}
            if ">" not in codec:
                cases["gather_sum"] = lambda x=x, codec=codec: all_reduce(x, codec, None, "gather_sum")
                scattered = torch.empty(rows * size, 4, 96, dtype=torch.bfloat16, device="meta")
                cases["reduce_scatter"] = lambda x=scattered, codec=codec: reduce_scatter(x, codec)
            made |= {(name, codec, rows): count(call) for name, call in cases.items()}
    return made


@pytest.mark.parametrize("size", GROUPS)
def test_launches_and_collectives(size):
    expected = {"gather_sum": (2, 1), "two_step": (3, 2), "reduce_scatter": (2, 1)}
    made = run_ranks(counted, 1, size, init=False)[0]
    assert len(made) == len(ROWS) * (3 * len(CODECS) - 2)
    for (name, _, rows), (counts, shape) in made.items():
        launches, collectives = expected[name]
        # Of fewer rows than ranks, this rank may have no sum to compute.
        idle = name == "two_step" and rows * 4 < 2
        assert counts == {"launch": launches - idle, "collective": collectives}, (name, rows)
        assert math.prod(shape) == rows * 4 * 96


# As rank 1, or as one that owns no share: islands, rank.
BY_LEVEL = {
    "2x2": ([[0, 1], [2, 3]], 1),
    "2x8": ([[*range(8)], [*range(8, 16)]], 1),
    "2+3": ([[0, 1], [2, 3, 4]], 1),
    "2+3, no share": ([[0, 1], [2, 3, 4]], 4),
}


def counted_by_level(rank, ranks):
    """{case: (counts, shape)} of hierarchical sums."""
    made = {}
    dist.all_gather_object = lambda everyone, own, group: everyone.__setitem__(slice(None), [own] * len(everyone))
    for name, (members, as_rank) in BY_LEVEL.items():
        islands = Islands(members)
        start(as_rank, islands.ranks)
        how = {"algorithm": "hierarchical", "topology": connect({None: islands})[None]}
        for rows, codec in itertools.product((1, 1000), CODECS):
            x = torch.empty(rows, 4, 96, dtype=torch.bfloat16, device="meta")
            cases = {"all_reduce": functools.partial(all_reduce, x, codec, None, **how)}
            if ">" not in codec and islands.are_equal:
                x = x.new_empty(rows * islands.ranks, 4, 96)
                cases["reduce_scatter"] = functools.partial(reduce_scatter, x, codec, **how)
            made |= {(name, case, codec, rows): count(call) for case, call in cases.items()}
        dist.destroy_process_group()
    return made


def test_hierarchical_sums():
    made = run_ranks(counted_by_level, 1, init=False)[0]
    assert len(made) == 2 * (4 * len(CODECS) + 2 * (len(CODECS) - 1))
    for (name, case, codec, rows), (counts, shape) in made.items():
        if "no share" in name:
            expected = {"launch": 1, "collective": 2}
        elif case == "all_reduce":
            two_phases = ">" in codec
            expected = {"launch": 2 + two_phases, "collective": 3 + two_phases}
        else:  # the rows of a place, which are those of a rank in each machine, are put beside one another
            expected = {"launch": 2, "collective": 2, "cat": 1}
        assert counts == expected, (name, case, codec, rows)
        assert math.prod(shape) == rows * 4 * 96
