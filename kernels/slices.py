"""All slices of a tensor to their messages, and all slices' messages to the tensor, in one launch each.

A tensor's rows are dealt out to `slices` ranks: the first `longs` of them have `rows` rows, the others one row less.
7 rows for 3 ranks are slices of 3, 2 and 2 rows: `rows` = 3, `longs` = 1. Their messages stand one after another in
`encode_slices`; in `decode_slices` each has a slot as long as the longest. A kernel's second axis is the slice.
"""

import torch
import triton
import triton.language as tl

from .decode_sum import decode_tile
from .encode import encode_tile, largest_need, load_tile, store_row_scale
from .format import TILE, WARPS, KernelFormat
from .numbers import store_rounded


def encode_slices(
    x: torch.Tensor,
    sent: torch.Tensor,
    longs: int,
    slices: int,
    rows: int,
    at: tuple,
    short_at: tuple,
    fmt: KernelFormat,
    flat: bool,
    align: int,
) -> None:
    """`x` [rows of all slices, hidden], contiguous, into `sent`.

    at, short_at: the sections' offsets in messages of long and of short slices. flat: a slice counts as one long row.
    """
    hidden = x.shape[1]
    programs = rows if fmt.row_scaled else _tiles(rows, hidden, flat)
    encode_slices_kernel[(programs, slices)](
        x, sent, longs, rows, hidden, at, short_at, fmt, flat, TILE, align, num_warps=WARPS, enable_fp_fusion=False
    )


@triton.jit
def its_slice(longs, rows, hidden, FLAT: tl.constexpr):
    """(its number, whether it is long, short ones before it, its rows and columns in its message, its first value)."""
    number = tl.program_id(1)
    is_long = number < longs
    shorts = tl.maximum(number - longs, 0)
    start = (tl.cast(number, tl.int64) * rows - shorts) * hidden
    its_rows = rows - tl.where(is_long, 0, 1)
    if FLAT:
        # The host keeps slices of 2^31 values and more from being flat.
        columns, its_rows = its_rows * hidden, tl.full((), 1, tl.int32)
    else:
        columns = tl.cast(hidden, tl.int32)
    return number, is_long, shorts, its_rows, columns, start


@triton.jit
def encode_slices_kernel(
    x_ptr,
    sent,
    longs,
    rows,
    hidden,
    at,
    short_at,
    F: tl.constexpr,
    FLAT: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    number, is_long, shorts, its_rows, columns, start = its_slice(longs, rows, hidden, FLAT)
    END: tl.constexpr = len(at) - 1
    shorter_by = tl.cast(shorts, tl.int64) * (at[END] - short_at[END])
    message = tl.multiple_of(sent + (tl.cast(number, tl.int64) * at[END] - shorter_by), 16)
    its_at = (at, short_at, is_long)
    x_slice = x_ptr + start
    program = tl.program_id(0)
    tiles = tl.cast(tl.cdiv(columns, TILE), tl.int32)
    if F.row_scaled:
        row = program.to(tl.int64)
        if row < its_rows:
            x_row = x_slice + row * columns
            largest = 0.0
            for tile in range(tiles):
                x_NB, left = load_tile(x_row, tile, columns, F, TILE)
                largest = tl.maximum(largest, largest_need(x_NB, left, F))
            scale = store_row_scale(largest, message, its_at, its_rows, row, F)
            for tile in range(tiles):
                x_NB, left = load_tile(x_row, tile, columns, F, TILE)
                encode_tile(x_NB, left, scale, message, its_at, its_rows, columns, row, tile, F, TILE, ALIGN)
    else:
        row, tile = (program // tiles).to(tl.int64), program % tiles
        if row < its_rows:
            x_NB, left = load_tile(x_slice + row * columns, tile, columns, F, TILE)
            encode_tile(x_NB, left, 1.0, message, its_at, its_rows, columns, row, tile, F, TILE, ALIGN)


def decode_slices(
    slots: torch.Tensor,
    out: torch.Tensor,
    longs: int,
    slices: int,
    rows: int,
    at: tuple,
    short_at: tuple,
    fmt: KernelFormat,
    flat: bool,
    align: int,
) -> None:
    """uint8 `slots` [slices, bytes of the longest message], contiguous, to contiguous `out` [rows of all, hidden]."""
    decode_slices_kernel[(_tiles(rows, out.shape[1], flat), slices)](
        slots,
        out,
        longs,
        rows,
        out.shape[1],
        at,
        short_at,
        fmt,
        flat,
        TILE,
        align,
        num_warps=WARPS,
        enable_fp_fusion=fmt.exact_products,
    )


@triton.jit
def decode_slices_kernel(
    slots,
    out_ptr,
    longs,
    rows,
    hidden,
    at,
    short_at,
    F: tl.constexpr,
    FLAT: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    number, is_long, _, its_rows, columns, start = its_slice(longs, rows, hidden, FLAT)
    END: tl.constexpr = len(at) - 1
    message = tl.multiple_of(slots + tl.cast(number, tl.int64) * at[END], 16)
    program = tl.program_id(0)
    tiles = tl.cast(tl.cdiv(columns, TILE), tl.int32)
    row, tile = (program // tiles).to(tl.int64), program % tiles
    HALF: tl.constexpr = out_ptr.dtype.element_ty == tl.float16
    if row < its_rows:
        first = tl.cast(tile, tl.int64) * TILE
        left = tl.minimum(columns - first, TILE).to(tl.int32)
        its_at = (at, short_at, is_long)
        y_NB = decode_tile(message, its_at, its_rows, columns, row, first, left, F, TILE, ALIGN, HALF)
        place = tl.arange(0, TILE)
        store_rounded(out_ptr + start + row * columns + first + place, y_NB.reshape(TILE), place < left)


def _tiles(rows: int, hidden: int, flat: bool) -> int:
    """Of the longest slice."""
    return triton.cdiv(rows * hidden, TILE) if flat else rows * triton.cdiv(hidden, TILE)
