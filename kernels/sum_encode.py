# SPDX-License-Identifier: Apache-2.0
"""Partial sums of several ranks, as they are, to the messages of their sum: fp32 in rank order, one tile a program.

Legend: N blocks of a tile, B values a block.
"""

import torch
import triton
import triton.language as tl

from .encode import clean, encode_row, load_neighbours
from .format import ALIGNMENT, KernelFormat, tile_for
from .numbers import widened
from .slices import row_and_tile, section_offsets, slice_rows, take


def sum_encode(
    parts: torch.Tensor,
    messages: torch.Tensor,
    starts: tuple,
    first_rows: tuple,
    programs: int,
    fmt: KernelFormat,
    flat: bool,
    align: int,
) -> None:
    """Contiguous `parts` [ranks, rows, hidden] into `messages`, one for each slice of their sum, all in one launch.

    Other arguments: as of `encode.encode`.
    """
    tile, warps, one_tile = tile_for(fmt.block, parts.shape[2], flat, fmt.row_scaled)
    sum_encode_kernel[(programs, len(starts))](
        parts,
        messages,
        starts,
        first_rows,
        parts.shape[2],
        fmt,
        len(parts),
        flat,
        one_tile,
        tile,
        align,
        num_warps=warps,
        enable_fp_fusion=False,
    )


@triton.jit
def sum_encode_kernel(
    parts,
    messages,
    starts,
    first_rows,
    hidden,
    F: tl.constexpr,
    RANKS: tl.constexpr,
    FLAT: tl.constexpr,
    ONE_TILE: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    message = messages + take(starts, tl.program_id(1)) * ALIGNMENT
    first_row, rows, columns = slice_rows(first_rows, hidden, FLAT)
    apart = take(first_rows, 0, len(first_rows) - 1) * hidden
    part = parts + first_row * hidden
    at = section_offsets(rows, columns, F)
    row, tile = row_and_tile(columns, FLAT, TILE, F.row_scaled)
    if (row < rows) & (tl.cast(tile, tl.int64) * TILE < columns):
        encode_row(
            load_sum,
            (part + row * hidden, columns, apart, RANKS),
            message,
            at,
            rows,
            columns,
            row,
            tile,
            F,
            ONE_TILE,
            TILE,
            ALIGN,
        )


@triton.jit
def load_sum(tile, row, columns, apart, RANKS: tl.constexpr, F: tl.constexpr, TILE: tl.constexpr):
    """(fp32 [N, B], how many of its values belong to the row): what `encode.load_tile` returns, of a sum.

    row: where the first rank's row starts. apart: values from there to the next rank's.
    """
    first = tl.cast(tile, tl.int64) * TILE
    left = tl.minimum(columns - first, TILE).to(tl.int32)
    part = row + first
    total = widened(load_neighbours(part, left, TILE))
    for _ in tl.range(1, RANKS, loop_unroll_factor=4):  # more at a time would spill registers
        part += apart
        total += widened(load_neighbours(part, left, TILE))
    return clean(total.reshape(TILE // F.block, F.block), F), left
