# SPDX-License-Identifier: Apache-2.0
"""Which rows and which message a program works on: a kernel's second grid axis is the slice.

A tensor of one message is one slice. `first_rows`, made by `as_arguments`: the first row of each slice, and the number
of all rows. FLAT: the rows of a slice share no block and no byte, and are taken for one long row.
"""

from collections.abc import Iterable

import triton
import triton.language as tl

from .format import ALIGNMENT


def as_arguments(numbers: Iterable[int]) -> tuple[int, ...]:
    """A kernel's argument for which it is compiled once, whatever the numbers are.

    In a tuple Triton makes every 1 a compile-time constant and tells multiples of 16 from others, even where it is
    told not to specialize. What is sent is neither: 2n + 3.
    """
    return tuple(2 * number + 3 for number in numbers)


@triton.jit
def take(arguments, place, AFTER: tl.constexpr = 0):
    """int64: the number at `place` + AFTER, where `place` is one that only the kernel knows."""
    number = arguments[AFTER]
    for i in tl.static_range(1, len(arguments) - AFTER):
        number = tl.where(place == i, arguments[AFTER + i], number)
    return tl.cast((number - 3) >> 1, tl.int64)


@triton.jit
def slice_rows(first_rows, hidden, FLAT: tl.constexpr):
    """(first row, rows, columns) of this program's slice, int64; of a flat slice as the one long row that it is."""
    slice = tl.program_id(1)
    first_row = take(first_rows, slice)
    rows, columns = take(first_rows, slice, 1) - first_row, tl.cast(hidden, tl.int64)
    if FLAT:
        columns = rows * columns
        rows = tl.minimum(rows, 1)
    return first_row, rows, columns


@triton.jit
def row_and_tile(columns, FLAT: tl.constexpr, TILE: tl.constexpr, BY_ROW: tl.constexpr = False):
    """(row, int64, and tile of this program). BY_ROW: there is a program for each row, which begins with tile 0."""
    program = tl.program_id(0)
    if FLAT:
        row, tile = tl.cast(program * 0, tl.int64), program
    elif BY_ROW:
        row, tile = program.to(tl.int64), 0
    else:
        # 32-bit: a 64-bit division takes a hundred instructions.
        tiles = tl.cdiv(columns, TILE).to(tl.int32)
        row, tile = (program // tiles).to(tl.int64), program % tiles
    return row, tile


@triton.jit
def bytes_of(bits):
    """How many bytes hold so many bits. A shift, because a division of what may be negative takes several steps."""
    return (bits + 7) >> 3


@triton.jit
def blocks_of(values, B: tl.constexpr):
    """How many blocks of B, a power of two, hold so many values."""
    return (values + (B - 1)) >> (B.bit_length() - 1)


@triton.jit
def section_offsets(rows, columns, F: tl.constexpr):
    """The byte offsets of a message's sections and of its end, as `wire/message.py` lays them out."""
    end = rows * 0
    at = (end,)
    for section in tl.static_range(len(F.sections)):
        row_bytes = bytes_of(_codes_of_a_row(columns, F, section) * F.sections[section][1])
        end += (rows * row_bytes + (ALIGNMENT - 1)) & -ALIGNMENT
        at = at + (end,)
    return at


@triton.jit
def _codes_of_a_row(columns, F: tl.constexpr, SECTION: tl.constexpr):
    UNIT: tl.constexpr = F.sections[SECTION][0]
    if UNIT == "value":
        codes = columns
    elif UNIT == "block":
        codes = blocks_of(columns, F.block)
    elif UNIT == "spike":
        codes = blocks_of(columns, F.block) * 2
    else:
        codes = columns * 0 + 1
    return codes
