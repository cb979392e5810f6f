# SPDX-License-Identifier: Apache-2.0
"""What mixes the values of a block: the order of every addition is fixed, so results are compared to the bit."""

import kernel_cases as cases
import pytest
import torch
import triton
import triton.language as tl

from megatron_comp.kernels.blocks import _butterflies, hadamard, pairwise_sum
from megatron_comp.wire import reference
from megatron_comp.wire.formats import BLOCK_SIZES


@triton.jit
def run_butterflies(x, y, N: tl.constexpr, B: tl.constexpr, D: tl.constexpr):
    place = tl.arange(0, N * B)
    tl.store(y + place, _butterflies(tl.load(x + place).reshape(N, B), D).reshape(N * B))


@triton.jit
def run_hadamard(x, y, left, N: tl.constexpr, B: tl.constexpr):
    """`left`: the values of each program that count, of its N * B."""
    place = tl.program_id(0) * N * B + tl.arange(0, N * B)
    tl.store(y + place, hadamard(tl.load(x + place).reshape(N, B), left, B).reshape(N * B))


@triton.jit
def run_pairwise_sum(x, y, N: tl.constexpr, B: tl.constexpr):
    place = tl.arange(0, N * B)
    tl.store(y + tl.arange(0, N), pairwise_sum(tl.load(x + place).reshape(N, B), B))


def blocks(*values, n=1):
    return torch.tensor(values, dtype=torch.float32, device=cases.DEVICE).repeat(n, 1)


def test_hadamard_example():
    y = blocks(1, 2, 3, 4)
    for distance, expected in [(1, (3, -1, 7, -1)), (2, (10, -2, -4, 0))]:
        run_butterflies[(1,)](y, y, 1, 4, distance)
        assert y[0].tolist() == list(expected)
    y = blocks(1, 2, 3, 4, n=2)
    run_hadamard[(1,)](y, y, 8, 2, 4)
    assert y.tolist() == [[5, -1, -2, 0]] * 2


def test_a_block_that_is_not_whole_stays_as_it_is():
    for left, whole in [(4, 1), (7, 1), (3, 0)]:
        y = blocks(1, 2, 3, 4, n=2)
        run_hadamard[(1,)](y, y, left, 2, 4)
        assert y.tolist() == [[5, -1, -2, 0]] * whole + [[1, 2, 3, 4]] * (2 - whole)


@pytest.mark.parametrize("block", [8, 256])
def test_hadamard_of_one_value_is_a_row_of_signs(block):
    """The entry in row i, column j of the matrix has the sign of the parity of i & j."""
    x = torch.eye(block, device=cases.DEVICE)
    y = torch.empty_like(x)
    run_hadamard[(block // 8,)](x, y, 8 * block, 8, block)
    parity = torch.tensor([[(i & j).bit_count() % 2 for j in range(block)] for i in range(block)])
    assert torch.equal(y.cpu(), (1.0 - 2.0 * parity) * torch.tensor(block**-0.5))


@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_hadamard_rounds_as_the_reference_does(block):
    """Values of many magnitudes, so that another order of additions would show."""
    x = cases.tensor((1, 4096), torch.float32, 8).nan_to_num(0, 1, -1).clamp(-1e30, 1e30)
    y = torch.empty_like(x, device=cases.DEVICE)
    run_hadamard[(1,)](x.to(cases.DEVICE), y, 4096, 4096 // block, block)
    expected = reference._hadamard(x.view(1, -1, block), 4096).view(1, 4096)
    cases.assert_same_bits(y.cpu(), expected)


def test_pairwise_sum_adds_neighbours_first():
    """In fp32 1 is lost beside 2^24, 2 is not."""
    big = 2.0**24
    y = blocks(0, 0)
    run_pairwise_sum[(1,)](torch.cat([blocks(1, 1, big, 0), blocks(1, big, 1, 0)]), y, 2, 4)
    assert y[0].tolist() == [big + 2, big]
    assert ((0 + 1.0) + big) == big + 1, "in fp64, whose sums have no such order"
