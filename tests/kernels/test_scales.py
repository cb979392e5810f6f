# SPDX-License-Identifier: Apache-2.0
"""The scale stage alone, over the whole range of what blocks can need."""

import itertools

import kernel_cases as cases
import pytest
import torch
import triton
import triton.language as tl

from megatron_comp.kernels.scales import reciprocal_of_power_below, scale_codes, scale_values
from megatron_comp.wire import gpu, scales
from megatron_comp.wire.formats import ELEMENTS, SCALES, Format


@triton.jit
def run_scale_codes(need, codes, reciprocals, row, N: tl.constexpr, F: tl.constexpr, WHICH: tl.constexpr):
    place = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(need + place)
    found, its_reciprocals = scale_codes(x, x != x, tl.load(row), F, WHICH)
    tl.store(codes + place, found)
    tl.store(reciprocals + place, its_reciprocals)


@triton.jit
def run_scale_values(codes, values, row, N: tl.constexpr, F: tl.constexpr):
    place = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(values + place, scale_values(tl.load(codes + place), tl.load(row), F))


@triton.jit
def run_reciprocal(peak, y, N: tl.constexpr):
    place = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + place, reciprocal_of_power_below(tl.load(peak + place)))


def codes_of(codec, need, row=1.0, which=0):
    fmt = gpu.kernel_format(Format.parse(codec))
    need = torch.as_tensor(need, dtype=torch.float32).to(cases.DEVICE)
    codes, reciprocals = torch.empty_like(need, dtype=torch.int32), torch.empty_like(need)
    row = torch.tensor([row], dtype=torch.float32, device=cases.DEVICE)
    each = min(len(need), cases.PROGRAM)
    run_scale_codes[(len(need) // each,)](need, codes, reciprocals, row, each, fmt, which)
    return codes.cpu(), reciprocals.cpu()


def needs():
    """2^15 of them: NaN, zero and all powers of two, with mantissas of four bits and with those beside ties, and all
    the normal bf16 above 2^-62; from the smallest normal number to the largest."""
    exponents = torch.arange(1, 255)[:, None] << 23
    mantissas = torch.arange(0, 1 << 23, 1 << 19)
    beside = (mantissas[:, None] + torch.tensor([-1, 0, 1])).flatten().clamp(min=0)
    bits = torch.cat(
        [(exponents + beside).flatten(), torch.arange(65 << 7, 255 << 7)[: (1 << 15) - 2 - 254 * 48] << 16]
    )
    return torch.cat([torch.tensor([torch.nan, 0.0]), bits.int().view(torch.float32)])


def test_example():
    codes, reciprocals = codes_of("mxfp4", [5.0, 5.0])
    assert codes.tolist() == [127, 127] and reciprocals.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "element, scale", [pair for pair in itertools.product(ELEMENTS, SCALES) if cases.goes_with(*pair)]
)
def test_every_element_scale_and_rule(element, scale):
    for rule in cases.rules(scale):
        check(cases.name(element, 32, scale, rule))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("element", ["fp4_e2m1", "int5"])
def test_every_candidate_of_the_search(element, scale):
    codec = cases.name(element, 32, scale, "search")
    for which in range(1, len(scales.candidates(Format.parse(codec)))):
        check(codec, which)


def check(codec, which=0):
    fmt, need = Format.parse(codec), needs()
    row = scales.row_scale(need[None], fmt) if fmt.scale.row_scaled else None
    codes, reciprocals = codes_of(codec, need, 1.0 if row is None else row.item(), which)
    expected, its_reciprocals = scales.scale_codes(need[None], fmt, scales.candidates(fmt)[which], row)
    cases.assert_same_bits(codes, expected[0].int())
    good = ~need.isnan()  # a block with NaN may have any
    cases.assert_same_bits(reciprocals[good], its_reciprocals[0][good])


@pytest.mark.parametrize("scale", SCALES)
def test_every_code_has_its_value(scale):
    """All 2^bits of them, for fp32 2^16: NaN and what encoding never sends, such as infinities, too."""
    fmt = Format.parse(f"int4:32:{scale}")
    codes = torch.arange(1 << min(fmt.scale.bits, 16)).int() << max(fmt.scale.bits - 16, 0)
    row = torch.tensor([[0.3]]) if fmt.scale.row_scaled else None
    values = torch.empty(codes.shape, device=cases.DEVICE)
    on_device = codes.to(cases.DEVICE), torch.tensor([0.3], device=cases.DEVICE)
    each = min(len(codes), cases.PROGRAM)
    run_scale_values[(len(codes) // each,)](on_device[0], values, on_device[1], each, gpu.kernel_format(fmt))
    expected = scales.scale_values(codes[None], fmt, row)[0]
    cases.assert_same_bits(values.cpu(), expected)


def test_reciprocal_of_power_below():
    peaks = needs()[1:].tolist() + [1.5]
    y = torch.empty(len(peaks), device=cases.DEVICE)
    run_reciprocal[(len(peaks) // cases.PROGRAM,)](torch.tensor(peaks, device=cases.DEVICE), y, cases.PROGRAM)
    exponents = torch.frexp(torch.tensor(peaks))[1] - 1
    exponents[0] = -127  # of zero: the largest reciprocal that is
    assert torch.equal(y.cpu(), torch.ldexp(torch.ones(len(peaks)), (-exponents).clamp(-126, 126)))
