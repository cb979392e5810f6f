"""All slices of a tensor in one launch: the bytes and values of one slice after another."""

import kernel_cases as cases
import pytest
import torch

from megatron_comp.wire import gpu, message, reference
from megatron_comp.wire.formats import Format

CODECS = ["mxfp4", "nvfp4", "int5:32:fp16:hadamard", "fp5_e2m2:8:e5m0", "flash-int4", "int3:8:fp32:asym:spike"]
# (slices, rows, hidden): even slices, slices of two lengths, slices without a row, one row each, odd bytes, two tiles.
DEALT = [(2, 4, 64), (3, 7, 33), (8, 5, 40), (4, 4, 1), (16, 17, 8), (2, 3, 4104)]


def dealt(rows, slices):
    return tuple(rows // slices + (number < rows % slices) for number in range(slices))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("slices, rows, hidden", DEALT)
def test_messages_of_all_slices(codec, slices, rows, hidden):
    fmt, counts = Format.parse(codec), dealt(rows, slices)
    x = cases.tensor((rows, hidden), torch.bfloat16, fmt.block, seed=rows)
    sizes = [message.layout(fmt, count, hidden).nbytes for count in counts]
    out = torch.full((sum(sizes),), 0xFF, dtype=torch.uint8)
    gpu.encode_slices(x, fmt, counts, out)
    for part, found, size in zip(x.split(counts), out.split(sizes), sizes, strict=True):
        expected = torch.empty(size, dtype=torch.uint8)
        if len(part):
            reference.encode(part, fmt, expected)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("slices, rows, hidden", DEALT)
def test_values_of_all_slices(codec, slices, rows, hidden):
    """What stands behind a short message in its slot is never read."""
    fmt, counts = Format.parse(codec), dealt(rows, slices)
    dtype = [torch.bfloat16, torch.float32][slices % 2]
    x = cases.tensor((rows, hidden), dtype, fmt.block, seed=slices)
    sizes = [message.layout(fmt, count, hidden).nbytes for count in counts]
    slots = torch.full((slices, sizes[0]), 0xFF, dtype=torch.uint8)
    expected = torch.empty_like(x)
    for part, slot, size, values in zip(x.split(counts), slots, sizes, expected.split(counts), strict=True):
        if len(part):
            reference.encode(part, fmt, slot[:size])
            reference.decode_sum(slot[None, :size], fmt, values)
    out = torch.full_like(x, torch.nan)
    gpu.decode_slices(slots, fmt, counts, out)
    cases.assert_same_bits(out, expected)


def test_uneven_splits():
    """Of a reduce-scatter by `splits`: slice by slice, in any order of lengths."""
    fmt, counts, hidden = Format.parse("mxfp4"), (0, 2, 5, 1), 64
    x = cases.tensor((8, hidden), torch.float32, fmt.block, seed=1)
    sizes = [message.layout(fmt, count, hidden).nbytes for count in counts]
    out, expected = (torch.full((sum(sizes),), fill, dtype=torch.uint8) for fill in (0xFF, 0))
    gpu.encode_slices(x, fmt, counts, out)
    for part, its_message in zip(x.split(counts), expected.split(sizes), strict=True):
        if len(part):
            reference.encode(part, fmt, its_message)
    assert torch.equal(out, expected)
