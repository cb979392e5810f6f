# SPDX-License-Identifier: Apache-2.0
"""All slices of a tensor in one launch: the bytes, and back the values, that each slice has by itself."""

import kernel_cases as cases
import pytest
import torch

from megatron_comp.kernels.slices import as_arguments
from megatron_comp.wire.formats import Format

DTYPES = [*cases.DTYPES.values()]
# As all-reduces and reduce-scatters cut: evenly, long slices before short ones, few rows, and as experts do.
ROWS = [(2, 2), (2, 2, 1), (1,) * 8, (1, 1, 1, 0, 0), (1,) * 5 + (0,) * 11, (0, 3, 1), (1, 0, 4, 2), (0, 2, 0)]
# Where it is the codec that matters: with every row and slice the interpreter runs more programs.
FEW_ROWS = [(1, 1), (2, 1), (1, 1, 0), (0, 2, 1), (0, 2, 0)]


@pytest.mark.parametrize("codec", cases.MIXED)
def test_shapes(codec):
    fmt, turn = Format.parse(codec), cases.MIXED.index(codec)
    for i, hidden in [*enumerate([1, fmt.block * 4, 33, 4096 + 40])][turn % 2 :: 2]:
        cases.check_slices(fmt, FEW_ROWS[(turn + 3 * i) % len(FEW_ROWS)], hidden, DTYPES[(turn + i) % 3], seed=turn)


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("codec", ["mxfp4", "nvfp4"])
def test_any_slices(codec, rows):
    cases.check_slices(Format.parse(codec), rows, 96, torch.bfloat16)


@pytest.mark.parametrize("codec", ["mxfp4", "nvfp4"])
def test_strided_rows(codec):
    """Rows cut out of longer ones, in slices."""
    fmt, rows = Format.parse(codec), (2, 0, 1)
    wide = cases.tensor((3, 128), torch.bfloat16, 32)
    parts = [cases.encoded(fmt, [part])[0].cpu() for part in wide[:, :64].split(rows) if len(part)]
    out = cases.Guarded((sum(map(len, parts)),), torch.uint8)
    cases.gpu.encode_slices(wide.to(cases.DEVICE)[:, :64], fmt, rows, out.tensor)
    assert torch.equal(out.tensor.cpu(), torch.cat(parts))
    assert out.untouched_around()


def test_other_rows_need_no_other_kernel():
    """Triton compiles again for numbers in a tuple that are 1, that 16 divides, or that need 64 bits."""
    for number in as_arguments(range(1000)) + as_arguments([(1 << 30) - 2]):
        assert number != 1
        assert number % 16
        assert number < 1 << 31


def test_a_sum_beyond_half_precision_is_infinite():
    """40000 + 40000, which came as one message of a sum, as in a stock sum; one rank's message alone is cut."""
    fmt = Format.parse("mxfp8")
    message = cases.encoded(fmt, [torch.full((1, 32), 80000.0)])
    for decode, expected in [
        (lambda out: cases.gpu.decode_slices(message, fmt, (1,), out), torch.inf),
        (lambda out: cases.gpu.decode_sum(message, fmt, out), 65504.0),
    ]:
        out = torch.empty((1, 32), dtype=torch.float16, device=cases.DEVICE)
        decode(out)
        assert (out == expected).all()


def test_messages_off_words_are_read_all_the_same():
    fmt, shape = Format.parse("mxfp4"), (2, 96)
    messages = cases.encoded(fmt, [cases.tensor(shape, torch.bfloat16, 32, seed) for seed in range(2)])
    odd = torch.empty(2, messages.shape[1] + 1, dtype=torch.uint8, device=cases.DEVICE)[:, 1:]
    odd.copy_(messages)
    cases.check_decode_sum(fmt, odd, shape, torch.bfloat16)
    cases.check_decode_sum_encode(fmt, odd, shape, fmt)
