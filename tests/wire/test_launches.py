# SPDX-License-Identifier: Apache-2.0
"""What a sum costs a GPU: kernel launches, collectives, and nothing beside them. Counted on tensors without data."""

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

LAUNCHERS = ("_encode", "_encode_slices", "_decode_sum", "_decode_sum_encode", "_decode_slices")
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


def counted(rank, ranks, size):
    """{case: counts} of sums as rank 1 of a group of `size` on the Triton backend."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=size, store=FakeStore())
    codecs.choose_backend = lambda device_type: gpu
    made = {}
    for rows in ROWS:
        for codec in CODECS:
            x = torch.empty(rows, 4, 96, dtype=torch.bfloat16, device="meta")
            cases = {"two_step": lambda x=x, codec=codec: all_reduce(x, codec, None, "two_step")}
            if ">" not in codec:
                cases["gather_sum"] = lambda x=x, codec=codec: all_reduce(x, codec, None, "gather_sum")
                scattered = torch.empty(rows * size, 4, 96, dtype=torch.bfloat16, device="meta")
                cases["reduce_scatter"] = lambda x=scattered, codec=codec: reduce_scatter(x, codec)
            for name, call in cases.items():
                with Recorder() as recorder:
                    for launcher in LAUNCHERS:
                        setattr(gpu, launcher, recorder.launcher)
                    y = call()
                made[name, codec, rows] = dict(recorder.counts), tuple(y.shape)
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
