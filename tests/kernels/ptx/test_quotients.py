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


def newton_step(scales, near):
    return fused(fused(-scales, near, F32(1)), near, near)


def nearby(x, error):
    """x that is off by so many units in the last place."""
    return (x.view(U32) + U32(error & 0xFFFFFFFF)).view(F32)


@pytest.mark.parametrize("error", [-2, -1, 0, 1, 2])
def test_reciprocals_of_fp16(error):
    """Of all scales, from an approximation that is off by so many units in the last place."""
    scales = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(F32)
    exact = F32(1) / scales
    found = newton_step(scales, nearby(exact, error))
    np.testing.assert_array_equal(found.view(U32), exact.view(U32))


@pytest.mark.parametrize("error", [-2, -1, 0, 1, 2])
def test_reciprocals_of_any_scale(error):
    """Some mantissas, those next to powers of two among them; all 2^23 were tried once, and the last one is known."""
    ends = np.arange(1 << 10, dtype=U32)
    others = np.random.default_rng(0).integers(0, 1 << 23, 1 << 17, dtype=U32)
    scales = (np.concatenate([ends, ends + U32((1 << 23) - (1 << 10)), others]) + U32(0x3F800000)).view(F32)
    exact = F32(1) / scales
    found = newton_step(scales, newton_step(scales, nearby(exact, error)))
    known = scales.view(U32) & U32(0x7FFFFF) == U32(0x7FFFFF)
    assert known.any()
    found = np.where(known, (U32(254 << 23) - scales.view(U32)).view(F32), found)
    np.testing.assert_array_equal(found.view(U32), exact.view(U32))


def test_quotients_by_rows():
    """All that matter: from 2^-10 to e4m3's largest value, by rows from the smallest to those of the largest bf16."""
    random = np.random.default_rng(0)
    rows = random.integers(F32(2.0**-117).view(U32), F32(2.0**116).view(U32), 1 << 18, dtype=U32).view(F32)
    ratios = random.integers(F32(2.0**-10).view(U32), F32(448).view(U32), 1 << 18, dtype=U32).view(F32)
    ratios[::2] = np.round(ratios[::2] * 16) / 16  # ties of codes, and next to them
    x = rows * ratios
    exact = x / rows
    raised = np.where(rows < F32(2.0**-60), F32(2.0**64), F32(1))
    rows, x = rows * raised, x * raised
    inverse = F32(1) / rows
    found = x * inverse
    for _ in range(2):
        found = fused(fused(-found, rows, x), inverse, found)
    matters = exact >= F32(2.0**-10)
    np.testing.assert_array_equal(found[matters].view(U32), exact[matters].view(U32))
