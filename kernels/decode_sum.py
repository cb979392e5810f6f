# SPDX-License-Identifier: Apache-2.0
"""Messages of all ranks to the sum of what they carry: fp32 in rank order, rounded once, one tile a program.

Legend: N blocks of a tile, B values a block.
"""

import torch
import triton
import triton.language as tl

from .blocks import hadamard
from .format import KernelFormat, tile_for
from .numbers import FP16_MAX, element_values, store_rounded, to_float
from .planes import load_field, places
from .scales import scale_values
from .slices import row_and_tile, section_offsets, slice_rows


def decode_sum(
    messages: torch.Tensor,
    out: torch.Tensor,
    ranks: int,
    clamp: bool,
    first_rows: tuple,
    programs: int,
    fmt: KernelFormat,
    flat: bool,
    align: int,
) -> None:
    """`messages` [slices * ranks, bytes], so many ranks' of each slice, to their sums: contiguous `out` [rows, hidden].

    clamp: to the largest fp16. first_rows: see `slices.py`. programs: of the longest slice.
    """
    tile, warps, _ = tile_for(fmt.block, out.shape[1], flat)
    decode_sum_kernel[(programs, len(first_rows) - 1)](
        messages,
        messages.stride(0),
        out,
        first_rows,
        out.shape[1],
        fmt,
        ranks,
        flat,
        clamp,
        tile,
        align,
        num_warps=warps,
        enable_fp_fusion=fmt.exact_products,
    )


@triton.jit
def decode_sum_kernel(
    messages,
    message_stride,
    out_ptr,
    first_rows,
    hidden,
    F: tl.constexpr,
    RANKS: tl.constexpr,
    FLAT: tl.constexpr,
    CLAMP: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    first_row, rows, columns = slice_rows(first_rows, hidden, FLAT)
    at = section_offsets(rows, columns, F)
    message = messages + tl.program_id(1).to(tl.int64) * RANKS * message_stride
    row, tile = row_and_tile(columns, FLAT, TILE)
    first = tl.cast(tile, tl.int64) * TILE
    if (row < rows) & (first < columns):
        total_NB, left = sum_tile(message, message_stride, at, rows, columns, row, tile, F, RANKS, TILE, ALIGN)
        if CLAMP:
            # Half precision cannot hold what a power-of-two scale may round 65504 up to.
            total_NB = tl.where(total_NB > FP16_MAX, FP16_MAX, tl.where(total_NB < -FP16_MAX, -FP16_MAX, total_NB))
        place = tl.arange(0, TILE)
        out = out_ptr + (first_row * hidden + row * columns + first) + place
        store_rounded(out, total_NB.reshape(TILE), place < left)


@triton.jit
def sum_tile(
    messages,
    message_stride,
    at,
    rows,
    hidden,
    row,
    tile,
    F: tl.constexpr,
    RANKS: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """(fp32 [N, B], how many of its values belong to the row): the sum of one tile over the ranks' messages.

    The values past the row's end are zeros, but with zero points, with levels and in blocks of NaN. The transform is
    linear: what the ranks sent is summed transformed, and the sum is transformed back.
    """
    first = tl.cast(tile, tl.int64) * TILE
    left = tl.minimum(hidden - first, TILE).to(tl.int32)
    total_NB = decode_tile(messages, at, rows, hidden, row, first, left, F, TILE, ALIGN)
    # Groups of four, the first one with what does not divide: more unrolled ranks would spill registers.
    ALONE: tl.constexpr = (RANKS - 1) % 4 + 1
    for rank in tl.static_range(1, ALONE):
        message = messages + rank * tl.cast(message_stride, tl.int64)
        total_NB += decode_tile(message, at, rows, hidden, row, first, left, F, TILE, ALIGN)
    for group in range(ALONE, RANKS, 4):
        for i in tl.static_range(4):
            message = messages + (group + i) * tl.cast(message_stride, tl.int64)
            total_NB += decode_tile(message, at, rows, hidden, row, first, left, F, TILE, ALIGN)
    if F.hadamard:
        total_NB = hadamard(total_NB, left, F.block)
    return total_NB, left


@triton.jit
def decode_tile(
    message,
    at,
    rows,
    hidden,
    row,
    first,
    left,
    F: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """fp32 [N, B]: one rank's values of a tile, still transformed where the format has a transform."""
    B: tl.constexpr = F.block
    N: tl.constexpr = TILE // B
    values, blocks, spikes = places(message, at, rows, hidden, row, first, left, B)
    PAYLOAD: tl.constexpr = F.payload
    SCALE: tl.constexpr = F.scale
    ZERO_POINT: tl.constexpr = F.zero_point
    SPIKE_VALUE: tl.constexpr = F.spike_value
    SPIKE_INDEX: tl.constexpr = F.spike_index
    row_scale = 1.0
    if F.row_scaled:
        ROW_SCALE: tl.constexpr = F.row_scale.first
        row_scale = tl.load((message + at[ROW_SCALE]).to(tl.pointer_type(tl.float32)) + row)
    # One by one, whatever the alignment: a thread loads those of its own blocks. Words of several scales would have to
    # be dealt out through shared memory, with barriers, for each rank.
    scales = scale_values(load_field(blocks, SCALE, N, 1), row_scale, F)
    payload = load_field(values, PAYLOAD, TILE, ALIGN)
    y_NB = element_values(payload.reshape(N, B), F) * scales[:, None]
    if F.asym:
        zeros = load_field(blocks, ZERO_POINT, N, ALIGN)
        y_NB += to_float(zeros << 16)[:, None]
    if F.spike:
        bits = load_field(spikes, SPIKE_VALUE, 2 * N, ALIGN)
        low, high = tl.split(to_float(bits << 16).reshape(N, 2))
        lowest, highest = tl.split(load_field(spikes, SPIKE_INDEX, 2 * N, ALIGN).reshape(N, 2))
        place = tl.arange(0, B)[None, :]
        y_NB = tl.where(place == lowest[:, None], low[:, None], y_NB)
        y_NB = tl.where(place == highest[:, None], high[:, None], y_NB)
    return y_NB
