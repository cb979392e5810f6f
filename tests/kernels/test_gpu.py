# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels on a real GPU: the CPU's bytes, and nothing that a CUDA graph or an asynchronous caller cannot have.

`pytest tests/kernels` on a machine with a GPU runs all other tests of this folder compiled as well, in some minutes.
"""

import kernel_cases as cases
import pytest
import torch

from megatron_comp.wire import gpu, message, reference
from megatron_comp.wire.formats import Format

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CODECS = [*cases.MIXED, "int8:32:fp16", "int4:32:e8m0:ceil:search", "int6:64:fp32:asym:hadamard:search:spike"]
SHAPE, RANKS = (5, 4096), 3


def tensors(dtype, shape=SHAPE, seed=0):
    return [cases.tensor(shape, dtype, 32, seed + rank) for rank in range(RANKS)]


@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=cases.DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_equal_bits(codec, dtype):
    fmt = Format.parse(codec)
    for turn, shape in enumerate([*cases.shapes(fmt).values(), (64, 4096), (37, 4096 + 33)]):
        parts = tensors(dtype, shape, turn)
        cases.check_encode(fmt, parts[0].to(cases.DEVICE))
        messages = cases.encoded(fmt, parts)
        cases.check_decode_sum(fmt, messages, shape, dtype)
        cases.check_decode_sum_encode(fmt, messages, shape, fmt)


@pytest.mark.parametrize("pair", ["mxfp4>mxfp8", "int4:32:fp16>int8:32:fp16", "nvfp4>flash-int4", "mxfp6>nvfp4"])
def test_two_codecs(pair):
    first, second = map(Format.parse, pair.split(">"))
    for shape in [(64, 4096), (37, 4096 + 33)]:
        cases.check_decode_sum_encode(first, cases.encoded(first, tensors(torch.bfloat16, shape)), shape, second)


@pytest.mark.parametrize("hidden", [16_384, 16_384 + 8], ids=["as one long row", "row by row"])
def test_more_than_2_to_the_31_values(hidden):
    """Places beyond what 32 bits can count, in the tensor and in the message: first and last rows are right."""
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of free memory")
    fmt, shape = Format.parse("int8:32:fp32"), (140_001, hidden)
    ends = cases.tensor((4, shape[1]), torch.bfloat16, 32)
    x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    x[:2], x[-2:] = ends[:2], ends[2:]
    layout = message.layout(fmt, *shape)
    its_message = torch.full((layout.nbytes,), 0xFF, dtype=torch.uint8, device="cuda")
    gpu.encode(x, fmt, its_message)
    of_ends = torch.empty(message.layout(fmt, *ends.shape).nbytes, dtype=torch.uint8)
    reference.encode(ends, fmt, of_ends)
    for field, sections in message.layout(fmt, *ends.shape).fields.items():
        for section, whole in zip(sections, layout.fields[field]):
            rows = whole.view(its_message)
            assert torch.equal(torch.cat([rows[:2], rows[-2:]]).cpu(), section.view(of_ends))
    y = torch.full_like(x, torch.nan)
    gpu.decode_sum(its_message[None], fmt, y)
    expected = torch.empty_like(ends)
    reference.decode_sum(of_ends[None], fmt, expected)
    cases.assert_same_bits(torch.cat([y[:2], y[-2:]]).cpu(), expected)


class Chain:
    """The kernels in the order of an all-reduce, on tensors made beforehand; `x` [RANKS, *SHAPE] is the input."""

    def __init__(self, codec):
        self.fmt = Format.parse(codec)
        nbytes = message.layout(self.fmt, *SHAPE).nbytes
        self.x = torch.zeros((RANKS, *SHAPE), dtype=torch.bfloat16, device="cuda")
        self.messages = torch.empty((RANKS, nbytes), dtype=torch.uint8, device="cuda")
        self.total = torch.empty(SHAPE, dtype=torch.bfloat16, device="cuda")
        self.again = torch.empty(nbytes, dtype=torch.uint8, device="cuda")

    def fill(self, seed):
        for x, new in zip(self.x, tensors(torch.bfloat16, seed=seed)):
            x.copy_(new)
        for out in (self.messages, self.total.view(torch.uint8), self.again):
            out.fill_(0xFF)

    def run(self):
        for x, its_message in zip(self.x, self.messages):
            gpu.encode(x, self.fmt, its_message)
        gpu.decode_sum(self.messages, self.fmt, self.total)
        gpu.decode_sum_encode(self.messages, SHAPE, self.fmt, self.fmt, self.again)

    def check(self):
        messages = cases.encoded(self.fmt, [x.cpu() for x in self.x]).cpu()
        total, again = self.total.cpu(), self.again.cpu()
        assert torch.equal(self.messages.cpu(), messages)
        reference.decode_sum(messages, self.fmt, total)
        cases.assert_same_bits(self.total.cpu(), total)
        reference.decode_sum_encode(messages, SHAPE, self.fmt, self.fmt, again)
        assert torch.equal(self.again.cpu(), again)


@pytest.mark.parametrize("codec", CODECS)
def test_cuda_graph(codec):
    """Captured once; each replay works on what the input holds by then."""
    chain = Chain(codec)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain.run()  # compiles
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            chain.run()
    seen = []
    for seed in (10, 20):
        chain.fill(seed)
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        chain.check()
        seen.append(chain.messages.clone())
    assert not torch.equal(*seen)


@pytest.mark.parametrize("codec", CODECS)
def test_no_synchronization_and_no_allocation(codec):
    """After the first call, which compiles."""
    chain = Chain(codec)
    chain.fill(30)
    chain.run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        chain.run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    chain.check()
