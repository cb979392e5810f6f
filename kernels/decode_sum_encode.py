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
    tiles = tl.cdiv(hidden, TILE).to(tl.int32)
    N: tl.constexpr = TILE // OUT.block
    if OUT.row_scaled:
        row = program.to(tl.int64)
        largest = 0.0
        for tile in range(tiles):
            x, left = sum_tile(messages, message_stride, at, rows, hidden, row, tile, F, RANKS, TILE, ALIGN, False)
            largest = tl.maximum(largest, largest_need(clean(x.reshape(N, OUT.block), OUT), left, OUT))
        scale = store_row_scale(largest, out, out_at, rows, row, OUT)
        for tile in range(tiles):
            x, left = sum_tile(messages, message_stride, at, rows, hidden, row, tile, F, RANKS, TILE, ALIGN, False)
            x_NB = clean(x.reshape(N, OUT.block), OUT)
            encode_tile(x_NB, left, scale, out, out_at, rows, hidden, row, tile, OUT, TILE, ALIGN)
    else:
        row, tile = (program // tiles).to(tl.int64), program % tiles
        x, left = sum_tile(messages, message_stride, at, rows, hidden, row, tile, F, RANKS, TILE, ALIGN, False)
        x_NB = clean(x.reshape(N, OUT.block), OUT)
        encode_tile(x_NB, left, 1.0, out, out_at, rows, hidden, row, tile, OUT, TILE, ALIGN)
