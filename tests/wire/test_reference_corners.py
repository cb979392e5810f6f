# SPDX-License-Identifier: Apache-2.0
"""The reference codec on corner blocks: NaN, infinities, zeros, the largest and the least numbers."""

import functools
import itertools

import numpy as np
import oracles
import pytest
import torch

from megatron_comp.wire.codec import Codec

# Corner blocks of every codec.

NAN, INF, FP32_MAX = float("nan"), float("inf"), float(np.finfo(np.float32).max)
# What one block holds (repeated to its length): these decode to NaN in every place.
BAD = [[NAN], [1, NAN, 2, 3], [0, 0, 0, INF], [1, 2, -INF, 3], [INF, -INF, NAN], [-NAN, 1e30], [INF]]
# These stay finite.
FINITE = [
    *([1e30], [-1e30], [1e30, 1, -2], [1e30, -1e30, 1e-30], [1e-30], [-1e-30, 1e-30], [1e-30, 1e-38]),
    *([oracles.BF16_MAX], [-oracles.BF16_MAX], [oracles.BF16_MAX, -oracles.BF16_MAX], [oracles.BF16_MAX, 0, 0]),
    *([1, -oracles.BF16_MAX], [oracles.BF16_MAX, 1e-30], [FP32_MAX], [-FP32_MAX, FP32_MAX], [65504]),
    *([65504, -65504], [2.0**-126], [2.0**-126, -(2.0**-125)], [2.0**-24], [1.0], [-5, 2.0**-126]),
]
# These decode to zeros, of their own sign in minifloats.
ZERO = [[0.0], [-0.0], [0.0, -0.0], [1e-39], [-1e-39, 0], [2.0**-127, -(2.0**-130)]]
CORNERS = BAD + FINITE + ZERO


@functools.cache
def corner_rows(block, dtype):
    """A row for each corner twice: in its second block of four, and in its last, short one."""
    width = 3 * block + block // 2 + 1
    x = oracles.random_tensor((2 * len(CORNERS), width), seed=3)
    mask = torch.zeros(x.shape, dtype=torch.bool)
    limit = {torch.float32: FP32_MAX, torch.bfloat16: oracles.BF16_MAX, torch.float16: 65504.0}[dtype]
    for row, values in enumerate(CORNERS + CORNERS):
        where = slice(block, 2 * block) if row < len(CORNERS) else slice(3 * block, width)
        length = where.stop - where.start
        filled = torch.tensor(values, dtype=torch.float32).repeat(-(-length // len(values)))[:length]
        x[row, where] = torch.where(filled.isfinite(), filled.clamp(-limit, limit), filled)
        mask[row, where] = True
    return x.to(dtype), mask


def check_corners(name):
    codec, element = Codec.parse(name), name.split(":")[0]
    count = len(CORNERS)
    kinds = torch.arange(2 * count) % count
    bad = kinds < len(BAD)
    zero = kinds >= len(BAD) + len(FINITE)
    for dtype, outputs in {
        torch.float32: [torch.float32, torch.bfloat16, torch.float16],
        torch.bfloat16: [torch.bfloat16, torch.float16],
        torch.float16: [torch.float16],
    }.items():
        x, mask = corner_rows(codec.format.block, dtype)
        message = codec.encode(x)
        calm = codec.encode(x.masked_fill(mask & bad[:, None], 0.0))
        for output in outputs:
            where = f"{name} {dtype} -> {output}"
            y = codec.decode(message, x.shape, output)
            assert torch.equal(y.isnan(), mask & bad[:, None]), where
            assert not y.isinf().any(), where
            others = codec.decode(calm, x.shape, output)
            assert oracles.same_bits(y.masked_fill(mask, 0), others.masked_fill(mask, 0)), where
            zeros = mask & zero[:, None]
            assert not y[zeros].any(), where
            if element not in oracles.INTEGERS and "hadamard" not in name:
                assert torch.equal(y[zeros].signbit(), x[zeros].signbit()), where
                small = (y == 0) & ~mask
                assert torch.equal(y[small].signbit(), x[small].signbit()), where


@pytest.mark.parametrize("element, scale", oracles.ELEMENTS_WITH_SCALES)
def test_corners_of_every_element_block_and_scale(element, scale):
    """NaN and infinity spoil their block and no other; finite blocks stay finite; zeros stay zeros; -0 stays -0."""
    for block in oracles.some_blocks(element, scale):
        check_corners(oracles.name(element, block, scale))


@pytest.mark.parametrize("element, scale", oracles.ELEMENTS_WITH_SCALES)
def test_corners_of_every_set_of_options(element, scale):
    """A share of all rules with all sets of flags; the block size goes around."""
    blocks = itertools.islice(itertools.cycle(oracles.BLOCKS), oracles.ELEMENTS.index(element), None)
    for options, block in zip(oracles.some_options(element, scale, 3), blocks):
        check_corners(oracles.name(element, block, scale, *options))


@pytest.mark.parametrize("name", oracles.PRESETS)
def test_corners_of_presets(name):
    check_corners(str(Codec.parse(name)))
