# SPDX-License-Identifier: Apache-2.0
"""Partial sums of several ranks, as they are, to the messages of their sum: fp32 in rank order, one tile a program.

Legend: N blocks of a tile, B values a block.
"""

import torch
import triton
import triton.language as tl

from .encode import clean, encode_tile, needs_of_row, store_row_scale
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
    tile, warps, one_tile = tile_for(fmt, parts.shape[2])
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
    if F.row_scaled:
        row = tl.program_id(0).to(tl.int64)
        if row < rows:
            if ONE_TILE:
                x_NB, left = load_sum(part + row * hidden, apart, 0, columns, F, RANKS, TILE)
                scale = store_row_scale(needs_of_row(x_NB, left, F), message, at, rows, row, F)
                encode_tile(x_NB, left, scale, message, at, rows, columns, row, 0, F, TILE, ALIGN)
            else:
                tiles = tl.cdiv(columns, TILE).to(tl.int32)
                needs = tl.zeros((TILE // F.block,), tl.float32)
                for tile in range(tiles):
                    x_NB, left = load_sum(part + row * hidden, apart, tile, columns, F, RANKS, TILE)
                    needs = tl.maximum(needs, needs_of_row(x_NB, left, F))
                scale = store_row_scale(needs, message, at, rows, row, F)
                for tile in range(tiles):
                    x_NB, left = load_sum(part + row * hidden, apart, tile, columns, F, RANKS, TILE)
                    encode_tile(x_NB, left, scale, message, at, rows, columns, row, tile, F, TILE, ALIGN)
    else:
        row, tile = row_and_tile(columns, FLAT, TILE)
        if (row < rows) & (tl.cast(tile, tl.int64) * TILE < columns):
            x_NB, left = load_sum(part + row * hidden, apart, tile, columns, F, RANKS, TILE)
            encode_tile(x_NB, left, 1.0, message, at, rows, columns, row, tile, F, TILE, ALIGN)


@triton.jit
def load_sum(row, apart, tile, columns, F: tl.constexpr, RANKS: tl.constexpr, TILE: tl.constexpr):
    """(fp32 [N, B], how many of its values belong to the row): what `encode.load_tile` returns, of a sum.

    row: where the first rank's row starts. apart: values from there to the next rank's.
    """
    first = tl.cast(tile, tl.int64) * TILE
    left = tl.minimum(columns - first, TILE).to(tl.int32)
    place_NB = tl.arange(0, TILE // F.block)[:, None] * F.block + tl.arange(0, F.block)[None, :]
    part = row + first + place_NB
    total_NB = widened(tl.load(part, mask=place_NB < left, other=0.0))
    for _ in tl.range(1, RANKS, loop_unroll_factor=4):  # more at a time would spill registers
        part += apart
        total_NB += widened(tl.load(part, mask=place_NB < left, other=0.0))
    return clean(total_NB, F), left
