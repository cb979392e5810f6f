# SPDX-License-Identifier: Apache-2.0
"""Where everything stands in a message, by examples with literal bytes, so that a change of layout is noticed."""

import numpy as np
import oracles
import pytest
import torch

from megatron_comp.wire import message
from megatron_comp.wire.codec import Codec
from megatron_comp.wire.formats import Format

FP4 = {0.0: 0, 0.5: 1, 1.0: 2, 1.5: 3, 2.0: 4, 3.0: 5, 4.0: 6, 6.0: 7}


def padded(*sections):
    """Bytes of sections, each filled up to 16."""
    return b"".join(bytes(section) + bytes(-len(section) % 16) for section in sections)


def encoded(codec, rows):
    return bytes(Codec.parse(codec).encode(torch.tensor(rows)).numpy())


def test_mxfp4_by_hand():
    """4-bit codes, the first in the low nibble; then one e8m0 byte a block: 2^0 and, for the short last block, 2^1."""
    row = [0.5, 1, 1.5, 2, 3, 4, 6, -6, 12, -0.0, -1]
    payload = [0x21, 0x43, 0x65, 0xF7, 0x87, 0x09]  # -1 is -0.5 * 2, code 9
    assert encoded("fp4_e2m1:8:e8m0", [row]) == padded(payload, [127, 128])
    other = [0.0] * 8 + [1.0] * 3
    assert encoded("fp4_e2m1:8:e8m0", [row, other]) == padded(
        payload + [0, 0, 0, 0, 0x66, 0x06], [127, 128, 0, 125]
    )  # 1 is 4 * 2^-2


def test_five_bit_planes_by_hand():
    """fp5_e2m2 with e5m0: the low four bits of all codes, then the fifth bits; the same for the 5-bit scales."""
    row = [7, 6, 5, 4, -7, -6, -0.25, 0.25] + [112.0, -112, 0, -0.0, 16, 32, 48, 64]
    codes = [15, 14, 13, 12, 31, 30, 17, 1] + [15, 31, 0, 16, 4, 8, 10, 12]
    low = [codes[i] % 16 | codes[i + 1] % 16 << 4 for i in range(0, 16, 2)]
    assert low == [0xEF, 0xCD, 0xEF, 0x11, 0xFF, 0x00, 0x84, 0xCA]
    high = [0b0111_0000, 0b0000_1010]
    # Scales 2^0 and 2^4 are codes 20 = 0b1_0100 and 24 = 0b1_1000.
    assert encoded("fp5_e2m2:8:e5m0", [row]) == padded(low, high, [0x84], [0b11])


def test_three_and_six_bit_planes_by_hand():
    """3 = 2 + 1 and 6 = 4 + 2 bits, low bits first."""
    three = [0, 1, 2, 3, -3, -2, -1, 0]
    codes = [0, 1, 2, 3, 5, 6, 7, 0]  # two's complement
    low = [0b11_10_01_00, 0b00_11_10_01]
    high = [sum((code >> 2) << i for i, code in enumerate(codes))]
    one = [0x00, 0x3C]  # fp16 1.0
    assert encoded("int3:8:fp16", [[float(v) for v in three]]) == padded(low, high, one)

    codes = [0, 31, 32 + 31, 1, 8, 16, 32 + 24, 2]  # sign, 2 exponent bits, 3 mantissa bits
    six = [0, 7.5, -7.5, 0.125, 1, 2, -4, 0.25]
    low = [codes[i] % 16 | codes[i + 1] % 16 << 4 for i in range(0, 8, 2)]
    high = [sum((codes[i + j] >> 4) << 2 * j for j in range(4)) for i in (0, 4)]
    assert encoded("fp6_e2m3:8:e8m0", [six]) == padded(low, high, [127])


def test_order_of_all_sections_by_hand():
    """payload, scales, row scales, zero points, spike values, spike indices (3 bits: 2 + 1)."""
    # Spikes -64 at 1 and 96 at 6 go out in bf16. The rest, 8 .. 23, has its zero point at 16 = 8 + 15 * 8 / 15: code 0.
    row = [8.0, -64, 9, 10, 16, 23, 96, 15]
    payload = [0x08, 0xA9, 0x70, 0xF0]
    row_scale, scale = np.float32(7 / 7 / 448).tobytes(), 126  # the only block's scale is the largest: 448 * 1/448
    zero_point = [0x80, 0x41]
    values = [0x80, 0xC2, 0xC0, 0x42]
    expected = padded(payload, [scale], row_scale, zero_point, values, [0b10_01], [0b1_0])
    assert encoded("int4:8:e4m3:asym:spike", [row]) == expected


@pytest.mark.parametrize("bad", [[np.nan], [-np.nan, 5], [np.inf, 1e30], [1, -np.inf, np.inf]], ids=str)
def test_blocks_with_nan_all_look_alike(bad):
    """Codes zero, the scale's one NaN, zero point 0, and for spikes the NaN 0x7FC0 at place 0, twice."""
    row = [2.0, *bad, *[3.0] * (7 - len(bad))]
    nan = [0xC0, 0x7F]
    expected = padded([0] * 4, [0x00, 0x7E], [0, 0], nan + nan, [0], [0])
    assert encoded("int4:8:fp16:asym:spike", [row]) == expected
    assert encoded("fp4_e2m1:8:e4m3", [row]) == padded([0] * 4, [0x7F], np.float32(2.0**-117).tobytes())


@pytest.mark.parametrize("rows, hidden", [(1, 1), (1, 33), (3, 31), (5, 64), (17, 100), (0, 64)])
def test_sections_do_not_overlap_and_start_at_multiples_of_16(rows, hidden):
    """Of every codec; also that the module's own description equals the independent one."""
    for codec in oracles.all_codecs():
        layout = message.layout(Format.parse(codec), rows, hidden)
        sections, nbytes = oracles.planes(codec, rows, hidden)
        ours = [
            (field, section.shift, section.width, section.columns, section.row_bytes, section.offset)
            for field, planes in layout.fields.items()
            for section in planes
        ]
        assert ours == sections
        assert layout.nbytes == nbytes
        ends = [section[-1] for section in sections] + [nbytes]
        for (*_, row_bytes, offset), end in zip(sections, ends[1:], strict=True):
            assert offset % message.ALIGNMENT == 0
            assert 0 <= end - offset - rows * row_bytes < message.ALIGNMENT


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 33])
def test_pack_and_unpack(bits, columns):
    """Every code in every plane comes back, and only the plane's own bits do."""
    codes = ((torch.arange(256)[:, None] + 37 * torch.arange(columns)) % 2**bits).to(torch.uint8)
    rebuilt = torch.zeros_like(codes)
    shift = 0
    for width in (width for width in (8, 4, 2, 1) if bits & width):
        section = message.Section(shift, width, columns, 256, 0)
        packed = message.pack(codes, section)
        assert packed.shape == (256, section.row_bytes) and packed.dtype == torch.uint8
        plane = message.unpack(packed, section)
        assert torch.equal(plane, codes & ((2**width - 1) << shift))
        rebuilt |= plane
        shift += width
    assert torch.equal(rebuilt, codes)


@pytest.mark.parametrize("element", ["int4", "int5", "fp6_e3m2", "fp8_e5m2"])
@pytest.mark.parametrize("scale", oracles.SCALES)
def test_any_message_survives_the_independent_reader_and_writer(element, scale):
    """Bit by bit: what `read` of the oracle finds, written again, is the message."""
    options = [*oracles.flag_sets(element)[-1]]
    codec = oracles.name(element, 16, scale, *options)
    x = oracles.random_tensor((5, 39), seed=2)
    encoded = Codec.parse(codec).encode(x)
    assert torch.equal(oracles.write(oracles.read(encoded, codec, 5, 39), codec, 5, 39), encoded)
