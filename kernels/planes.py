# SPDX-License-Identifier: Apache-2.0
"""Codes of a field to and from the sections of a message, one section per bit plane.

`place` says which codes: (message, at, rows, row, columns, first, count): the pointer to the message, the byte offsets
of all its sections and its end, how many rows it has, and of these row `row`, which has `columns` codes, the codes
`first` to `first + count`. A row of a section starts on ALIGN bytes. Where that is a word (4) or more, threads pack and
unpack words, otherwise bytes; codes wider than 8 bits travel as they are. Where it is 16, memory is accessed by so many
bytes at once, also past a row's last codes: what follows them there is the padding of their section.
"""

import triton
import triton.language as tl
from triton import constexpr_function

from .format import ALIGNMENT
from .slices import blocks_of, bytes_of


@constexpr_function
def unit_bits(count, width, align):
    """Bits of the unit that `count` codes of `width` bits travel in."""
    return width if width >= 16 else min(32 if align >= 4 else 8, count * width)


@constexpr_function
def repeated(code, count, width):
    """`count` times the same code of `width` bits, as an int32."""
    bits = sum((code & ((1 << width) - 1)) << (width * place) for place in range(count))
    return bits - (1 << 32) if bits >> 31 else bits


@constexpr_function
def integer_of(bits):
    return {8: tl.uint8, 16: tl.int16, 32: tl.int32}[bits]


@constexpr_function
def group_of(per_unit):
    """How many codes of a unit are cleaned at once: half of it, but no more than one block has, which is 8 or more."""
    return max(min(per_unit // 2, 8), 1)


@constexpr_function
def in_chunks(count, width, align):
    """Whether `count` codes go in chunks of 16 bytes, the last one with its padding, which is then zeros."""
    return align == 16 and count * width % 128 == 0


@triton.jit
def _first_of_chunk(index, COUNT: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr):
    """Of units, the first one in the same chunk: what is known to be equal for all of it is done in one access."""
    if in_chunks(COUNT, WIDTH, ALIGN):
        UNITS: tl.constexpr = 128 // unit_bits(COUNT, WIDTH, ALIGN)
        index = index // UNITS * UNITS
    return index


@triton.jit
def places(message, at, rows, hidden, row, first, left, B: tl.constexpr):
    """The places of a tile's values, of its blocks and of their spikes, two a block.

    The tile has the values `first` to `first + left` of a row of `hidden` (int64), in blocks of B.
    """
    columns, first_block, blocks_left = blocks_of(hidden, B), first // B, blocks_of(left, B)
    values = (message, at, rows, row, hidden, first, left)
    blocks = (message, at, rows, row, columns, first_block, blocks_left)
    spikes = (message, at, rows, row, columns * 2, first_block * 2, blocks_left * 2)
    return values, blocks, spikes


@triton.jit
def store_field(codes, place, FIELD: tl.constexpr, ALIGN: tl.constexpr, keep=None, PAIRS: tl.constexpr = False):
    """Stores int32 codes [n], of which those past the place's count must be 0; what their bits 22 and up hold is lost.

    keep [n]: 0 for the codes of a block of which zeros are stored instead, otherwise -1.
    PAIRS: the codes are [n / 2] pairs, from bits 0 and 16 up, with zeros above each; ALIGN is 4 or more, `keep` None.
    """
    for plane in tl.static_range(len(FIELD.planes)):
        _store_plane(codes, place, FIELD, plane, ALIGN, keep, PAIRS)


@triton.jit
def load_field(place, FIELD: tl.constexpr, COUNT: tl.constexpr, ALIGN: tl.constexpr):
    """int32 [COUNT] codes, 0 past the place's count."""
    codes = _load_plane(place, FIELD, 0, COUNT, ALIGN)
    for plane in tl.static_range(1, len(FIELD.planes)):
        codes |= _load_plane(place, FIELD, plane, COUNT, ALIGN)
    return codes


@triton.jit
def store_padding(place, SECTION: tl.constexpr, row_bytes):
    """The zeros between a section's last row and the next section, if the place is the first one of the message."""
    message, at, rows, row, columns, first, count = place
    end = at[SECTION] + rows * row_bytes
    left = tl.where(row + first == 0, at[SECTION + 1] - end, 0).to(tl.int32)
    byte = tl.arange(0, ALIGNMENT)
    tl.store(message + end + byte, tl.zeros((ALIGNMENT,), tl.uint8), mask=byte < left)


@triton.jit
def _store_plane(
    codes, place, FIELD: tl.constexpr, PLANE: tl.constexpr, ALIGN: tl.constexpr, keep, PAIRS: tl.constexpr
):
    SECTION: tl.constexpr = FIELD.first + PLANE
    SHIFT: tl.constexpr = FIELD.planes[PLANE][0]
    WIDTH: tl.constexpr = FIELD.planes[PLANE][1]
    PER_CODE: tl.constexpr = 2 if PAIRS else 1
    COUNT: tl.constexpr = codes.shape[0] * PER_CODE
    BITS: tl.constexpr = unit_bits(COUNT, WIDTH, ALIGN)
    PER_UNIT: tl.constexpr = BITS // WIDTH
    if len(FIELD.planes) > 1:
        codes = (codes >> SHIFT) & repeated((1 << WIDTH) - 1, PER_CODE, 16)
    if PAIRS:
        units = gather_pairs(codes, WIDTH)
    else:
        # Several codes at a time, all of one block, are cleared of what is above them and of what is not to be kept.
        GROUP: tl.constexpr = group_of(PER_UNIT)
        groups = gather_codes(codes, GROUP, WIDTH)
        if FIELD.flip:
            groups ^= repeated(FIELD.flip >> SHIFT, GROUP, WIDTH)
        if GROUP * WIDTH < 32:
            groups &= (1 << (GROUP * WIDTH)) - 1
        if keep is not None:
            for _level in tl.static_range(GROUP.bit_length() - 1):
                keep, _ = tl.split(keep.reshape(keep.shape[0] // 2, 2))
            groups &= keep
        units = gather_codes(groups, PER_UNIT // GROUP, WIDTH * GROUP)
    ptr, row_bytes = _pointer(place, SECTION, WIDTH, BITS, ALIGN)
    index = tl.arange(0, COUNT // PER_UNIT)
    mask = _first_of_chunk(index, COUNT, WIDTH, ALIGN) * PER_UNIT < place[6]
    tl.store(ptr + index, units.to(ptr.dtype.element_ty), mask=mask)
    if not in_chunks(COUNT, WIDTH, ALIGN):
        store_padding(place, SECTION, row_bytes)


@triton.jit
def _load_plane(place, FIELD: tl.constexpr, PLANE: tl.constexpr, COUNT: tl.constexpr, ALIGN: tl.constexpr):
    """int32 [COUNT]: the plane's bits where they belong in the codes."""
    SECTION: tl.constexpr = FIELD.first + PLANE
    SHIFT: tl.constexpr = FIELD.planes[PLANE][0]
    WIDTH: tl.constexpr = FIELD.planes[PLANE][1]
    BITS: tl.constexpr = unit_bits(COUNT, WIDTH, ALIGN)
    PER_UNIT: tl.constexpr = BITS // WIDTH
    ptr, _ = _pointer(place, SECTION, WIDTH, BITS, ALIGN)
    index = tl.arange(0, COUNT // PER_UNIT)
    mask = _first_of_chunk(index, COUNT, WIDTH, ALIGN) * PER_UNIT < place[6]
    units = tl.load(ptr + index, mask=mask, other=0).to(tl.int32)
    codes = spread_codes(units, PER_UNIT, WIDTH)
    if WIDTH < 32:
        codes &= (1 << WIDTH) - 1
    return codes << SHIFT


@triton.jit
def _pointer(place, SECTION: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, ALIGN: tl.constexpr):
    """Of the unit of BITS that holds the place's first code in a section, and the section's bytes per row."""
    message, at, rows, row, columns, first, count = place
    row_bytes = bytes_of(columns * WIDTH)
    ptr = message + at[SECTION] + tl.multiple_of(row * row_bytes, ALIGN) + first * WIDTH // 8
    INTEGER: tl.constexpr = integer_of(BITS)
    return ptr.to(tl.pointer_type(INTEGER)), row_bytes


@triton.jit
def gather_codes(codes, PER_UNIT: tl.constexpr, WIDTH: tl.constexpr):
    """[n] codes of WIDTH bits to [n / PER_UNIT] units, the first code lowest: 1, 2, 3, 4 of width 4 -> 0x21, 0x43.

    By halves, because a split is a thread's own business, where a reduction may be spread over several. Added, because
    a multiplication and an addition are one instruction.
    """
    units = codes
    for level in tl.static_range(PER_UNIT.bit_length() - 1):
        low, high = tl.split(units.reshape(units.shape[0] // 2, 2))
        units = low + (high << (WIDTH << level))
    return units


@triton.jit
def gather_pairs(pairs, WIDTH: tl.constexpr):
    """[n] pairs of codes of WIDTH bits, from bits 0 and 16 up, to words [n * WIDTH / 16], the first code lowest.

    NVIDIA only. The halves of two registers are exchanged: even codes go to the one, odd codes to the other.
    """
    halves = gather_codes(pairs, 8 // WIDTH, 2 * WIDTH)
    first, second = tl.split(halves.reshape(halves.shape[0] // 2, 2))
    WORD: tl.constexpr = word_of_halves(WIDTH)
    return tl.inline_asm_elementwise(WORD, "=r,r,r", [first, second], tl.int32, is_pure=True, pack=1)


@constexpr_function
def word_of_halves(width):
    """PTX that puts the codes in the upper halves of two registers between those in the lower ones."""
    return f"""{{
        .reg .b32 even, odd;
        prmt.b32 even, $1, $2, 0x5410;
        prmt.b32 odd, $1, $2, 0x7632;
        mad.lo.u32 $0, odd, {1 << width}, even;
    }}"""


@triton.jit
def spread_codes(units, PER_UNIT: tl.constexpr, WIDTH: tl.constexpr):
    """[n] units to [n * PER_UNIT] codes in their lowest bits, with other codes above them: 0x21 -> 0x21, 0x2."""
    codes = units
    for level in tl.static_range(PER_UNIT.bit_length() - 1):
        codes = tl.join(codes, codes >> (WIDTH * PER_UNIT >> (level + 1))).reshape(codes.shape[0] * 2)
    return codes
