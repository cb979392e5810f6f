# SPDX-License-Identifier: Apache-2.0
"""The reference codec writes the same bytes, and sums to the same bits, on a GPU as on a CPU.

So it may be the judge of what else runs on either. The kernels have their own file, tests/kernels/test_gpu.py.
"""

import kernel_cases as cases
import pytest
import torch

from megatron_comp.wire import reference
from megatron_comp.wire.formats import Format

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

RANKS = 3


@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=cases.DTYPES)
@pytest.mark.parametrize("codec", cases.MIXED)
def test_equal_bits(codec, dtype):
    fmt, shape = Format.parse(codec), (37, 4096 + 33)
    tensors = [cases.tensor(shape, dtype, fmt.block, seed) for seed in range(RANKS)]
    messages = cases.encoded(fmt, tensors)  # by the CPU
    for x, expected in zip(tensors, messages):
        found = torch.empty_like(expected)
        reference.encode(x.to(cases.DEVICE), fmt, found)
        assert torch.equal(found, expected)
    found, expected = torch.empty(shape, dtype=dtype, device=cases.DEVICE), torch.empty(shape, dtype=dtype)
    reference.decode_sum(messages, fmt, found)
    reference.decode_sum(messages.cpu(), fmt, expected)
    cases.assert_same_bits(found.cpu(), expected)
    again, expected = torch.empty_like(messages[0]), torch.empty_like(messages[0], device="cpu")
    reference.decode_sum_encode(messages, shape, fmt, fmt, again)
    reference.decode_sum_encode(messages.cpu(), shape, fmt, fmt, expected)
    assert torch.equal(again.cpu(), expected)
