# SPDX-License-Identifier: Apache-2.0
"""The middle of the two-step all-reduce: all ranks' messages to the message of their sum, which stays in registers."""

import torch
import triton
import triton.language as tl

from .blocks import before_end
from .decode_sum import sum_tile
from .encode import clean, encode_row
from .format import KernelFormat, tile_for
from .slices import row_and_tile, section_offsets, slice_rows


def decode_sum_encode(
    messages: torch.Tensor,
    out: torch.Tensor,
    first_rows: tuple,
    hidden: int,
    fmt: KernelFormat,
    out_fmt: KernelFormat,
    programs: int,
    flat: bool,
    align: int,
) -> None:
    """uint8 `messages` [ranks, bytes] of `fmt` to the message `out` of `out_fmt`. first_rows: see `slices.py`."""
    tile, warps, one_tile = tile_for(max(fmt.block, out_fmt.block), hidden, flat, out_fmt.row_scaled)
    decode_sum_encode_kernel[(programs,)](
        messages,
        messages.stride(0),
        out,
        first_rows,
        hidden,
        fmt,
        out_fmt,
        len(messages),
        flat,
        one_tile,
        tile,
        align,
        num_warps=warps,
        enable_fp_fusion=False,
    )


@triton.jit
def decode_sum_encode_kernel(
    messages,
    message_stride,
    out,
    first_rows,
    hidden,
    F: tl.constexpr,
    OUT: tl.constexpr,
    RANKS: tl.constexpr,
    FLAT: tl.constexpr,
    ONE_TILE: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    _, rows, columns = slice_rows(first_rows, hidden, FLAT)
    at, out_at = section_offsets(rows, columns, F), section_offsets(rows, columns, OUT)
    row, tile = row_and_tile(columns, FLAT, TILE, OUT.row_scaled)
    encode_row(  # In a variable, a tuple would lose what it has of compile-time constants.
        load_sum,
        (columns, messages, message_stride, at, rows, row, F, RANKS, ALIGN),
        out,
        out_at,
        rows,
        columns,
        row,
        tile,
        OUT,
        ONE_TILE,
        TILE,
        ALIGN,
    )


@triton.jit
def load_sum(
    tile,
    columns,
    messages,
    message_stride,
    at,
    rows,
    row,
    F: tl.constexpr,
    RANKS: tl.constexpr,
    ALIGN: tl.constexpr,
    OUT: tl.constexpr,
    TILE: tl.constexpr,
):
    """(fp32 [N, B] in the blocks of OUT, how many of its values belong to the row): what `encode.load_tile` returns."""
    total, left = sum_tile(messages, message_stride, at, rows, columns, row, tile, F, RANKS, TILE, ALIGN)
    B: tl.constexpr = OUT.block
    x_NB = total.reshape(TILE // B, B)
    if F.asym or F.levels is not None:  # past the row's end are zero points, or the first level
        x_NB = tl.where(before_end(left, TILE // B, B), x_NB, 0.0)
    return clean(x_NB, OUT), left
