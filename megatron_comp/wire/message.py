# SPDX-License-Identifier: Apache-2.0
"""Where everything stands in the bytes of a message.

A message carries a `[rows, hidden]` tensor as a row of sections, each padded to 16 bytes:

    payload | scales | row scales | zero points | spike values | spike indices

A field whose codes are not 1, 2, 4, 8, 16 or 32 bits wide travels as bit planes, one section each, low bits first
(5 = 4 + 1, 6 = 4 + 2, 3 = 2 + 1). Inside a plane, codes stand in order, the first in the lowest bits of a byte.
Each row of a section starts on a byte: a token's bytes do not depend on the tokens beside it.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from .formats import Format

ALIGNMENT = 16
# In the order in which they stand; a message has the first two, and of the others what its format needs.
FIELDS = ("payload", "scale", "row_scale", "zero_point", "spike_value", "spike_index")

_INTEGER_OF_BYTES = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Section:
    """One bit plane of a field: a row has `columns` codes of `width` bits, bits `shift` and up of the field's codes."""

    shift: int
    width: int
    columns: int
    rows: int
    offset: int

    @property
    def row_bytes(self) -> int:
        return -(-self.columns * self.width // 8)

    @property
    def end(self) -> int:
        return self.offset + -(-self.rows * self.row_bytes // ALIGNMENT) * ALIGNMENT

    def view(self, message: torch.Tensor) -> torch.Tensor:
        """uint8 `[rows, row_bytes]` inside a uint8 `[nbytes]` message."""
        return message.narrow(0, self.offset, self.rows * self.row_bytes).view(self.rows, self.row_bytes)


@dataclass(frozen=True)
class Layout:
    """The sections of a message of `[rows, hidden]` values, by field; `nbytes` in all."""

    fields: dict[str, tuple[Section, ...]]
    nbytes: int


def field_widths(fmt: Format) -> dict[str, tuple[str, int]]:
    """Each field's columns ("value", "block", "row", or "spike": two a block) and bits a column, in wire order."""
    widths = {"payload": ("value", fmt.element.bits), "scale": ("block", fmt.scale.bits)}
    if fmt.scale.row_scaled:
        widths["row_scale"] = ("row", 32)
    if fmt.asym:
        widths["zero_point"] = ("block", 16)
    if fmt.spike:
        widths["spike_value"] = ("spike", 16)
        widths["spike_index"] = ("spike", fmt.block.bit_length() - 1)
    return widths


@lru_cache(maxsize=4096)
def layout(fmt: Format, rows: int, hidden: int) -> Layout:
    blocks = -(-hidden // fmt.block)
    columns = {"value": hidden, "block": blocks, "row": 1, "spike": 2 * blocks}
    fields, offset = {}, 0
    for field, (unit, bits) in field_widths(fmt).items():
        sections, shift = [], 0
        for width in _planes(bits):
            sections.append(Section(shift, width, columns[unit], rows, offset))
            offset, shift = sections[-1].end, shift + width
        fields[field] = tuple(sections)
    return Layout(fields, offset)


def _planes(bits: int) -> list[int]:
    """Widths whose sum is `bits`, wide ones first, each a power of two."""
    return [1 << power for power in reversed(range(6)) if bits >> power & 1]


def pack(codes: torch.Tensor, section: Section) -> torch.Tensor:
    """One plane of integer codes `[rows, columns]` as uint8 `[rows, section.row_bytes]`."""
    if section.width > 8:
        return codes.to(_INTEGER_OF_BYTES[section.width // 8]).contiguous().view(torch.uint8)
    codes = codes.to(torch.uint8)
    if section.width == 8:
        return codes
    if section.shift:
        codes = codes >> section.shift
    codes = codes & (2**section.width - 1)
    per_byte = 8 // section.width
    if short := -section.columns % per_byte:
        codes = torch.nn.functional.pad(codes, (0, short))
    codes = codes.view(codes.shape[0], -1, per_byte)
    packed = codes[..., 0]
    for place in range(1, per_byte):
        packed = packed | (codes[..., place] << place * section.width)
    return packed


def unpack(plane: torch.Tensor, section: Section) -> torch.Tensor:
    """The reverse: uint8 `[rows, row_bytes]` to codes `[rows, columns]`, their bits back at `section.shift`.

    uint8 for planes up to 8 bits; the 16- or 32-bit integer that has the same bits for wider ones.
    """
    if section.width > 8:
        # A copy, because a message may begin at any byte and wide integers may not.
        return plane.clone(memory_format=torch.contiguous_format).view(_INTEGER_OF_BYTES[section.width // 8])
    if section.width == 8:
        return plane
    mask = 2**section.width - 1
    places = range(8 // section.width)
    codes = torch.stack([(plane >> place * section.width) & mask for place in places], dim=-1)
    codes = codes.view(plane.shape[0], -1)[:, : section.columns]
    return codes << section.shift if section.shift else codes


def read(message: torch.Tensor, sections: tuple[Section, ...], first: int, last: int) -> torch.Tensor:
    """The codes of one field, rows `first` to `last` (exclusive)."""
    planes = [unpack(section.view(message)[first:last], section) for section in sections]
    codes = planes[0]
    for plane in planes[1:]:
        codes = codes | plane
    return codes


def write(message: torch.Tensor, sections: tuple[Section, ...], first: int, codes: torch.Tensor) -> None:
    """Stores the codes of one field from row `first` on."""
    for section in sections:
        section.view(message)[first : first + codes.shape[0]] = pack(codes, section)
