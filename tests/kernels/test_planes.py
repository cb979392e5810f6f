# SPDX-License-Identifier: Apache-2.0
"""Codes to and from bytes."""

import kernel_cases as cases
import pytest
import torch
import triton
import triton.language as tl

from megatron_comp.kernels.planes import gather_codes, spread_codes
from megatron_comp.wire import gpu, message
from megatron_comp.wire.formats import Format


@triton.jit
def run_gather(codes, units, COUNT: tl.constexpr, PER_UNIT: tl.constexpr, WIDTH: tl.constexpr):
    gathered = gather_codes(tl.load(codes + tl.arange(0, COUNT)), PER_UNIT, WIDTH)
    tl.store(units + tl.arange(0, COUNT // PER_UNIT), gathered)


@triton.jit
def run_spread(units, codes, COUNT: tl.constexpr, PER_UNIT: tl.constexpr, WIDTH: tl.constexpr):
    spread = spread_codes(tl.load(units + tl.arange(0, COUNT // PER_UNIT)), PER_UNIT, WIDTH)
    tl.store(codes + tl.arange(0, COUNT), spread)


def gather(codes, per_unit, width):
    codes = torch.as_tensor(codes, dtype=torch.int32, device=cases.DEVICE)
    units = torch.empty(len(codes) // per_unit, dtype=torch.int32, device=cases.DEVICE)
    run_gather[(1,)](codes, units, len(codes), per_unit, width)
    return units.cpu()


def spread(units, per_unit, width):
    units = torch.as_tensor(units, dtype=torch.int32, device=cases.DEVICE)
    codes = torch.empty(len(units) * per_unit, dtype=torch.int32, device=cases.DEVICE)
    run_spread[(1,)](units, codes, len(codes), per_unit, width)
    return codes.cpu()


def test_examples():
    assert gather([1, 2, 3, 4], 2, 4).tolist() == [0x21, 0x43]
    assert spread([0x21, 0x43], 2, 4).tolist() == [0x21, 0x2, 0x43, 0x4]


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_units_hold_codes_as_messages_do(width, bits):
    codes = torch.randint(1 << width, (1, 256), generator=torch.Generator().manual_seed(0))
    section = message.Section(0, width, columns=256, rows=1, offset=0)
    packed = message.pack(codes, section).view(-1)
    units = gather(codes[0], bits // width, width)
    assert torch.equal(units.view(torch.uint8).view(-1, 4)[:, : bits // 8].flatten(), packed)
    assert torch.equal(spread(units, bits // width, width) & ((1 << width) - 1), codes[0].int())


@pytest.mark.parametrize("codec", [*cases.MIXED, "int8:256:fp32"])
def test_rows_stand_on_what_is_promised(codec):
    """Kernels tell the compiler that rows of a field start on so many bytes, which it takes for a fact."""
    fmt = Format.parse(codec)
    for shape in [*cases.shapes(fmt).values(), (2, 16), (2, 128)]:
        align = gpu._align(fmt, *shape, flat=False)
        for name, sections in message.layout(fmt, *shape).fields.items():
            for section in sections:
                if name != "row_scale" and shape[0] > 1:  # a row scale is found by an index of its own
                    assert section.row_bytes % align == 0, (name, shape)
