"""The middle of the two-step all-reduce: all ranks' messages to the message of their sum, which stays in registers."""

import torch
import triton
import triton.language as tl

from .decode_sum import sum_tile
from .encode import clean, encode_tile, largest_need, store_row_scale
from .format import TILE, WARPS, KernelFormat


def decode_sum_encode(
    messages: torch.Tensor,
    at: tuple,
    shape: tuple,
    fmt: KernelFormat,
    out: torch.Tensor,
    out_at: tuple,
    out_fmt: KernelFormat,
    align: int,
) -> None:
    """uint8 `messages` [ranks, bytes] of `fmt`, `shape` = (rows, hidden), to the message `out` of `out_fmt`."""
    rows, hidden = shape
    programs = rows if out_fmt.row_scaled else rows * triton.cdiv(hidden, TILE)
    decode_sum_encode_kernel[(programs,)](
        messages,
        messages.stride(0),
        at,
        out,
        out_at,
        rows,
        hidden,
        fmt,
        out_fmt,
        len(messages),
        TILE,
        align,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


@triton.jit
def decode_sum_encode_kernel(
    messages,
    message_stride,
    at,
    out,
    out_at,
    rows,
    hidden,
    F: tl.constexpr,
    OUT: tl.constexpr,
    RANKS: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    # 32-bit: a 64-bit division takes a hundred instructions.
    program = tl.program_id(0)
    tiles = tl.cast(tl.cdiv(hidden, TILE), tl.int32)
    if OUT.row_scaled:
        row = program.to(tl.int64)
        largest = 0.0
        for tile in range(tiles):
            x_NB, left = load_sum(messages, message_stride, at, rows, hidden, row, tile, F, OUT, RANKS, TILE, ALIGN)
            largest = tl.maximum(largest, largest_need(x_NB, left, OUT))
        scale = store_row_scale(largest, out, out_at, rows, row, OUT)
        for tile in range(tiles):
            x_NB, left = load_sum(messages, message_stride, at, rows, hidden, row, tile, F, OUT, RANKS, TILE, ALIGN)
            encode_tile(x_NB, left, scale, out, out_at, rows, hidden, row, tile, OUT, TILE, ALIGN)
    else:
        row, tile = (program // tiles).to(tl.int64), program % tiles
        x_NB, left = load_sum(messages, message_stride, at, rows, hidden, row, tile, F, OUT, RANKS, TILE, ALIGN)
        encode_tile(x_NB, left, 1.0, out, out_at, rows, hidden, row, tile, OUT, TILE, ALIGN)


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
    total, left = sum_tile(messages, message_stride, at, rows, hidden, row, tile, F, RANKS, TILE, ALIGN, False)
    B: tl.constexpr = OUT.block
    x_NB = total.reshape(TILE // B, B)
    if F.asym:  # past the row's end are zero points
        place_NB = tl.arange(0, TILE // B)[:, None] * B + tl.arange(0, B)[None, :]
        x_NB = tl.where(place_NB < left, x_NB, 0.0)
    return clean(x_NB, OUT), left
