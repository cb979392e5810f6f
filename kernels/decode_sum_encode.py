# SPDX-License-Identifier: Apache-2.0
"""The middle of the two-step all-reduce: all ranks' messages to the message of their sum, which stays in registers."""

import torch
import triton
import triton.language as tl

from .decode_sum import sum_tile
from .encode import clean, encode_tile, needs_of_row, store_row_scale
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
    tile, warps, one_tile = tile_for(out_fmt, hidden)
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
    if OUT.row_scaled:
        row = tl.program_id(0).to(tl.int64)
        if ONE_TILE:
            x_NB, left = load_sum(messages, message_stride, at, rows, columns, row, 0, F, OUT, RANKS, TILE, ALIGN)
            scale = store_row_scale(needs_of_row(x_NB, left, OUT), out, out_at, rows, row, OUT)
            encode_tile(x_NB, left, scale, out, out_at, rows, columns, row, 0, OUT, TILE, ALIGN)
        else:
            tiles = tl.cdiv(columns, TILE).to(tl.int32)
            needs = tl.zeros((TILE // OUT.block,), tl.float32)
            for tile in range(tiles):
                x_NB, left = load_sum(
                    messages, message_stride, at, rows, columns, row, tile, F, OUT, RANKS, TILE, ALIGN
                )
                needs = tl.maximum(needs, needs_of_row(x_NB, left, OUT))
            scale = store_row_scale(needs, out, out_at, rows, row, OUT)
            for tile in range(tiles):
                x_NB, left = load_sum(
                    messages, message_stride, at, rows, columns, row, tile, F, OUT, RANKS, TILE, ALIGN
                )
                encode_tile(x_NB, left, scale, out, out_at, rows, columns, row, tile, OUT, TILE, ALIGN)
    else:
        row, tile = row_and_tile(columns, FLAT, TILE)
        x_NB, left = load_sum(messages, message_stride, at, rows, columns, row, tile, F, OUT, RANKS, TILE, ALIGN)
        encode_tile(x_NB, left, 1.0, out, out_at, rows, columns, row, tile, OUT, TILE, ALIGN)


@triton.jit
def load_sum(
    messages,
    message_stride,
    at,
    rows,
    hidden,
    row,
    tile,
    F: tl.constexpr,
    OUT: tl.constexpr,
    RANKS: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """(fp32 [N, B] in the blocks of OUT, how many of its values belong to the row): what `encode.load_tile` returns."""
    total, left = sum_tile(messages, message_stride, at, rows, hidden, row, tile, F, RANKS, TILE, ALIGN)
    B: tl.constexpr = OUT.block
    x_NB = total.reshape(TILE // B, B)
    if F.asym:  # past the row's end are zero points
        place_NB = tl.arange(0, TILE // B)[:, None] * B + tl.arange(0, B)[None, :]
        x_NB = tl.where(place_NB < left, x_NB, 0.0)
    return clean(x_NB, OUT), left
