# SPDX-License-Identifier: Apache-2.0
"""The arithmetic by which `kernels/scales.py` divides when compiled: as good as divisions.

The interpreter divides, and a GPU's fused multiply-add is that of floats.py.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from floats import F32, U32, fma  # noqa: E402

from megatron_comp.wire.formats import ELEMENTS  # noqa: E402

INTEGERS = sorted({element.max_value for element in ELEMENTS.values() if element.max_value % 1 == 0})


def fused(a, b, c):
    a, b, c = (np.broadcast_to(F32(x), np.broadcast(a, b, c).shape).view(U32) for x in (a, b, c))
    return fma(F32, a, b, c).view(F32)


@pytest.mark.parametrize("divisor", INTEGERS)
def test_quotients(divisor):
    """Of the smallest numbers that have a quotient of 2^-127 or more, and of as many others of all sizes."""
    divisor = F32(divisor)
    smallest = (divisor * F32(2.0**-127)).view(U32)
    bits = np.random.default_rng(0).integers(smallest, F32(3.0e38).view(U32), 1 << 18, dtype=U32)
    x = np.concatenate([np.arange(smallest, smallest + (1 << 18), dtype=U32), bits]).view(F32)
    reciprocal = F32(1) / divisor
    quotient = x * reciprocal
    quotient = fused(fused(-quotient, divisor, x), reciprocal, quotient)
    np.testing.assert_array_equal(quotient.view(U32), (x / divisor).view(U32))


@pytest.mark.parametrize("error", [-2, -1, 0, 1, 2])
def test_reciprocals_of_fp16(error):
    """Of all scales, from an approximation that is off by so many units in the last place."""
    scales = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(F32)
    exact = F32(1) / scales
    near = (exact.view(U32) + U32(error & 0xFFFFFFFF)).view(F32)
    found = fused(fused(-scales, near, F32(1)), near, near)
    np.testing.assert_array_equal(found.view(U32), exact.view(U32))
