# SPDX-License-Identifier: Apache-2.0
"""Casts by integer arithmetic: every value of bf16, every code of every format."""

import kernel_cases as cases
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from megatron_comp.kernels.numbers import (
    bf16_bits,
    clean_codes,
    element_codes,
    element_values,
    small_float_codes,
    small_float_values,
    store_rounded,
)
from megatron_comp.wire import gpu, reference
from megatron_comp.wire.formats import ELEMENTS, SCALES, Format, SmallFloatScale

E2M1 = gpu.kernel_format(Format.parse("mxfp4")).element


@triton.jit
def run(x, y, N: tl.constexpr, FUNCTION: tl.constexpr, FORMAT: tl.constexpr):
    """y = FUNCTION(x, FORMAT), or of x alone if there is no FORMAT."""
    place = tl.program_id(0) * N + tl.arange(0, N)
    if FORMAT is None:
        tl.store(y + place, FUNCTION(tl.load(x + place)))
    else:
        tl.store(y + place, FUNCTION(tl.load(x + place), FORMAT))


@triton.jit
def codes_of_elements(y, FORMAT: tl.constexpr):
    return clean_codes(element_codes(y, FORMAT), FORMAT)


@triton.jit
def run_store_rounded(x, y, count, N: tl.constexpr):
    place = tl.program_id(0) * N + tl.arange(0, N)
    store_rounded(y + place, tl.load(x + place), place < count)


def on_device(values, dtype=torch.float32):
    return torch.as_tensor(values).to(cases.DEVICE, dtype)


def call(function, values, dtype_in, dtype_out, fmt=None):
    """What a function of the kernels makes of values, whose number must be a power of two."""
    values = on_device(values, dtype_in)
    out = torch.empty(values.shape, dtype=dtype_out, device=cases.DEVICE)
    each = min(len(values), cases.PROGRAM)
    run[(len(values) // each,)](values, out, each, function, fmt)
    return out.cpu()


def finite_fp32():
    """2^17 of them: all bf16, and of each middle of two bf16 itself or one of its fp32 neighbours."""
    bits = torch.arange(1 << 16, dtype=torch.int64) << 16
    beside = bits + 0x8000 + torch.arange(1 << 16) % 3 - 1
    x = torch.cat([bits, beside])
    x = torch.where(x >= 1 << 31, x - (1 << 32), x).int().view(torch.float32)
    return torch.where(x.isfinite(), x, 0.0)


# Worked examples of the docstrings.


def test_bf16_example():
    assert call(bf16_bits, [1.00390625, 1.00390625], torch.float32, torch.int32).tolist() == [0x3F80, 0x3F80]


def test_small_float_examples():
    codes = call(small_float_codes, [2.5, 3.5], torch.float32, torch.int32, E2M1)
    assert (codes & 7).tolist() == [4, 6]
    assert call(small_float_values, [5, 1, 4, 0], torch.int32, torch.float32, E2M1).tolist() == [3.0, 0.5, 2.0, 0.0]


# All there is.


@pytest.mark.parametrize(
    "codec", [f"{name}:32:fp32" for name in ELEMENTS] + [f"int{bits}:32:fp32:asym" for bits in range(2, 9)]
)
def test_element_codes(codec):
    fmt, x = Format.parse(codec), finite_fp32()
    codes = call(codes_of_elements, x, torch.float32, torch.int32, gpu.kernel_format(fmt))
    cases.assert_same_bits(codes, reference._quantize(x, fmt).int())


@pytest.mark.parametrize("element", ELEMENTS)
def test_element_values(element):
    """Of all codes that encoding sends, the sign of zero included."""
    table = np.array(ELEMENTS[element].table, dtype=np.float32)
    fmt = gpu.kernel_format(Format.parse(f"{element}:32:fp32"))
    values = call(element_values, range(len(table)), torch.int32, torch.float32, fmt).numpy()
    sent = np.isfinite(table)
    assert sent.sum() >= len(table) - 8
    np.testing.assert_array_equal(values[sent].view(np.int32), table[sent].view(np.int32))


@pytest.mark.parametrize("scale", [name for name, scale in SCALES.items() if isinstance(scale, SmallFloatScale)])
def test_small_float_values(scale):
    kernel_format = gpu.kernel_format(Format.parse(f"int4:32:{scale}"))
    count = kernel_format.scale_nan_code
    values = call(small_float_values, range(256), torch.int32, torch.float32, kernel_format.scale_float)
    np.testing.assert_array_equal(values[:count].numpy(), np.array(SCALES[scale].table[:count], dtype=np.float32))


def test_bf16_bits():
    x = finite_fp32()
    bits = call(bf16_bits, x, torch.float32, torch.int32)
    cases.assert_same_bits(bits, x.bfloat16().view(torch.int16).int() & 0xFFFF)


@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=cases.DTYPES)
def test_store_rounded(dtype):
    """To nearest, ties to even, with infinities and NaN; nothing is stored where the mask says no."""
    x = finite_fp32()
    x[:6] = torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan, 65519.996, 65520.0])
    x, y = on_device(x), torch.full(x.shape, 7.0, dtype=dtype, device=cases.DEVICE)
    run_store_rounded[(len(x) // cases.PROGRAM,)](x, y, len(x) - 100, cases.PROGRAM)
    expected = x.cpu().to(dtype)
    cases.assert_same_bits(y[:-100].cpu(), expected[:-100])
    assert (y[-100:] == 7).all()
