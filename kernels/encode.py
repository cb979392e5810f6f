# SPDX-License-Identifier: Apache-2.0
"""Partial sums to messages: transform -> scale -> quantize -> pack, one tile a program, device memory read once.

Legend: N blocks of a tile, B values a block.
"""

import torch
import triton
import triton.language as tl

from .blocks import before_end, hadamard, pairwise_sum
from .format import ALIGNMENT, KernelFormat, tile_for
from .numbers import (
    BF16_MAX,
    EXPONENT,
    MAGNITUDE,
    bf16_bits,
    clean_codes,
    element_code_pairs,
    element_codes,
    element_values,
    flush_subnormals,
    flushed_product,
    for_nvidia,
    largest_bits,
    to_bits,
    to_float,
    widened,
)
from .planes import places, store_field, store_padding
from .scales import reciprocal_of_power_below, row_scale, scale_codes, scale_values
from .slices import row_and_tile, section_offsets, slice_rows, take


def encode(
    x: torch.Tensor,
    messages: torch.Tensor,
    starts: tuple,
    first_rows: tuple,
    programs: int,
    fmt: KernelFormat,
    flat: bool,
    align: int,
) -> None:
    """`x` [rows, hidden] into `messages`, one for each slice of its rows, all in one launch.

    starts: where each message starts, in units of 16 bytes, as `slices.as_arguments` says it. first_rows: see
    `slices.py`. programs: of the longest slice.
    """
    tile, warps, one_tile = tile_for(fmt.block, x.shape[1], flat, fmt.row_scaled)
    if one_tile:
        # 64 values per thread, in place of 32, share what a tile costs: nvfp4 takes 15.3 instructions per value on
        # sm_90, and 18.1 with twice as many warps.
        warps = max(warps // 2, 1)
    encode_kernel[(programs, len(starts))](
        x,
        x.stride(0),
        messages,
        starts,
        first_rows,
        x.shape[1],
        fmt,
        flat,
        one_tile,
        tile,
        align,
        num_warps=warps,
        enable_fp_fusion=False,
    )


@triton.jit
def encode_kernel(
    x_ptr,
    x_stride,
    messages,
    starts,
    first_rows,
    hidden,
    F: tl.constexpr,
    FLAT: tl.constexpr,
    ONE_TILE: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    message = messages + take(starts, tl.program_id(1)) * ALIGNMENT
    first_row, rows, columns = slice_rows(first_rows, hidden, FLAT)
    x_slice = x_ptr + first_row * x_stride
    at = section_offsets(rows, columns, F)
    row, tile = row_and_tile(columns, FLAT, TILE, F.row_scaled)
    if (row < rows) & (tl.cast(tile, tl.int64) * TILE < columns):
        SHORT: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
        source = (x_slice + row * x_stride, columns)
        encode_row(load_tile, source, message, at, rows, columns, row, tile, F, ONE_TILE, TILE, ALIGN, SHORT)


@triton.jit
def encode_row(
    LOAD: tl.constexpr,
    source,
    message,
    at,
    rows,
    columns,
    row,
    tile,
    F: tl.constexpr,
    ONE_TILE: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
    SHORT: tl.constexpr = False,
):
    """Writes one tile of a row to the message, or the whole row if it has a scale.

    LOAD(tile, *source, F, TILE): (fp32 [N, B], how many of its values belong to the row), like `load_tile`.
    """
    if not F.row_scaled:
        x_NB, left = LOAD(tile, *source, F, TILE)
        encode_tile(x_NB, left, 1.0, message, at, rows, columns, row, tile, F, TILE, ALIGN, SHORT)
    elif ONE_TILE:
        x_NB, left = LOAD(0, *source, F, TILE)
        scale = store_row_scale(needs_of_row(x_NB, left, F), message, at, rows, row, F)
        encode_tile(x_NB, left, scale, message, at, rows, columns, row, 0, F, TILE, ALIGN, SHORT)
    else:
        # A row's scale comes before the scales of its blocks: a row of several tiles is read twice.
        tiles = tl.cdiv(columns, TILE).to(tl.int32)
        needs = tl.zeros((TILE // F.block,), tl.float32)
        for each in range(tiles):
            x_NB, left = LOAD(each, *source, F, TILE)
            needs = tl.maximum(needs, needs_of_row(x_NB, left, F))
        scale = store_row_scale(needs, message, at, rows, row, F)
        for each in range(tiles):
            x_NB, left = LOAD(each, *source, F, TILE)
            encode_tile(x_NB, left, scale, message, at, rows, columns, row, each, F, TILE, ALIGN, SHORT)


@triton.jit
def load_tile(tile, row, columns, F: tl.constexpr, TILE: tl.constexpr):
    """(fp32 [N, B], how many of its values belong to the row); zeros past the row's end. row: where the row starts."""
    first = tl.cast(tile, tl.int64) * TILE
    left = tl.minimum(columns - first, TILE).to(tl.int32)
    return clean(load_neighbours(row + first, left, TILE).reshape(TILE // F.block, F.block), F), left


@triton.jit
def load_neighbours(ptr, left, COUNT: tl.constexpr):
    """[COUNT] values, zeros from `left` on. Each thread gets 32 neighbouring bytes, by two loads of 16 bytes.

    With 16 at a time a block would be spread over twice as many threads, which would all make the same scale of it.
    """
    HALF: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    place = tl.arange(0, COUNT // (2 * HALF))[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
    low = tl.load(ptr + place, mask=place < left, other=0.0)
    high = tl.load(ptr + HALF + place, mask=HALF + place < left, other=0.0)
    return tl.trans(tl.join(low, high), 0, 2, 1).reshape(COUNT)


@triton.jit
def clean(x, F: tl.constexpr):
    """To fp32; subnormals to zeros of their sign, finite values within the format's limit."""
    DTYPE: tl.constexpr = x.dtype
    x = widened(x)
    if not DTYPE.is_fp16():  # which knows neither so small numbers nor so large ones
        if F.sees_subnormals and not F.flushes_when_scaled:
            x = flush_subnormals(x)
        if DTYPE.is_fp32() or F.limit < BF16_MAX:
            infinite = (to_bits(x) & MAGNITUDE) >= EXPONENT
            x = tl.where(infinite, x, tl.minimum(tl.maximum(x, -F.limit), F.limit))
    return x


@triton.jit
def encode_tile(
    x_NB,
    left,
    row_scale,
    message,
    at,
    rows,
    hidden,
    row,
    tile,
    F: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
    SHORT: tl.constexpr = False,
):
    """Writes all that a tile, fp32 [N, B] with `left` values of the row, brings to the message.

    SHORT: the values have been bf16 or fp16.
    """
    N: tl.constexpr = TILE // F.block
    first = tl.cast(tile, tl.int64) * TILE
    values, blocks, spikes = places(message, at, rows, hidden, row, first, left, F.block)
    PAYLOAD: tl.constexpr = F.payload
    SCALE: tl.constexpr = F.scale
    ZERO_POINT: tl.constexpr = F.zero_point
    SPIKE_VALUE: tl.constexpr = F.spike_value
    SPIKE_INDEX: tl.constexpr = F.spike_index

    x_NB, need, bad, zeros, spike_values, spike_places = prepare(x_NB, left, F)
    codes, reciprocals = choose_scales(x_NB, left, need, bad, row_scale, F)
    y_NB = scaled(x_NB, reciprocals[:, None], F)
    if F.element is not None and for_nvidia() and ALIGN >= 4:  # a byte might have to hold a single code
        store_field(element_code_pairs(y_NB, bad, F, SHORT), values, PAYLOAD, ALIGN, PAIRS=True)
    else:
        keep = tl.broadcast_to(tl.where(bad, 0, -1)[:, None], (N, F.block)).reshape(TILE)
        store_field(element_codes(y_NB.reshape(TILE), F), values, PAYLOAD, ALIGN, keep)
    store_field(codes, blocks, SCALE, ALIGN)
    if F.asym:
        store_field(tl.where(bad, 0, bf16_bits(zeros)), blocks, ZERO_POINT, ALIGN)
    if F.spike:
        store_field(spike_values.reshape(2 * N), spikes, SPIKE_VALUE, ALIGN)
        store_field(spike_places.reshape(2 * N), spikes, SPIKE_INDEX, ALIGN)


@triton.jit
def scaled(x, reciprocals, F: tl.constexpr):
    """x * reciprocals, where subnormal x count as zeros."""
    if F.flushes_when_scaled:
        return flushed_product(x, reciprocals)
    else:
        return x * reciprocals


@triton.jit
def store_row_scale(needs, message, at, rows, row, F: tl.constexpr):
    """The row's scale, stored as fp32; returned as well. needs: `needs_of_row`, the larger ones of all its tiles."""
    scale = row_scale(tl.max(needs, axis=0), F)
    SECTION: tl.constexpr = F.row_scale.first
    tl.store((message + at[SECTION]).to(tl.pointer_type(tl.float32)) + row, scale)
    store_padding((message, at, rows, row, 1, 0, 1), SECTION, 4)
    return scale


@triton.jit
def needs_of_row(x_NB, left, F: tl.constexpr):
    """fp32 [N]: what the row's scale must serve; blocks with NaN do not count."""
    _, need, bad, _, _, _ = prepare(x_NB, left, F)
    return tl.where(bad, 0.0, need)


@triton.jit
def prepare(x_NB, left, F: tl.constexpr):
    """All that comes before the scale: (values to quantize, need, bad, zero points, spike values, spike places).

    bad [N]: the block holds a NaN or an infinity. Spike values are bf16 bits; both are [N, 2], minimum and maximum.
    """
    N: tl.constexpr = x_NB.shape[0]
    B: tl.constexpr = F.block
    if F.hadamard:
        x_NB = hadamard(x_NB, left, B)
    peak = largest_bits(x_NB)
    bad = peak >= EXPONENT
    need = to_float(peak)
    zeros, spike_values, spike_places = 0.0, 0, 0
    if F.asym or F.spike:
        place_NB = tl.broadcast_to(tl.arange(0, B)[None, :], (N, B))
        live_NB = before_end(left, N, B)
        if F.spike:
            spike_values, spike_places, live_NB = take_spikes(x_NB, place_NB, live_NB, bad)
        if F.asym:
            zeros, need = zero_points(x_NB, live_NB, F)
            x_NB = tl.where(live_NB, x_NB - zeros[:, None], 0.0)
        else:
            x_NB = tl.where(live_NB, x_NB, 0.0)
            need = tl.max(tl.abs(x_NB), axis=1)
    return x_NB, need, bad, zeros, spike_values, spike_places


@triton.jit
def take_spikes(x_NB, place_NB, live_NB, bad):
    """(bf16 bits [N, 2], places [N, 2], what stays live): the block's minimum and maximum, the first of equals.

    A block with NaN has NaN at place 0, twice.
    """
    lowest = tl.argmin(tl.where(live_NB & ~bad[:, None], x_NB, float("inf")), axis=1, tie_break_left=True)
    highest = tl.argmax(tl.where(live_NB & ~bad[:, None], x_NB, float("-inf")), axis=1, tie_break_left=True)
    lowest, highest = tl.where(bad, 0, lowest), tl.where(bad, 0, highest)
    low_bits, high_bits = spike_bits(x_NB, place_NB, lowest, bad), spike_bits(x_NB, place_NB, highest, bad)
    live_NB = live_NB & (place_NB != lowest[:, None]) & (place_NB != highest[:, None])
    return tl.join(low_bits, high_bits), tl.join(lowest, highest), live_NB


@triton.jit
def spike_bits(x_NB, place_NB, places, bad):
    """bf16 bits [N] of each block's value at its place. Picked by bits: a sum of floats would lose the sign of zero."""
    bits = tl.sum(tl.where(place_NB == places[:, None], to_bits(x_NB), 0), axis=1)
    return tl.where(bad, 0x7FC0, bf16_bits(to_float(bits)))


@triton.jit
def zero_points(x_NB, live_NB, F: tl.constexpr):
    """(zero points, needs), [N]. A zero point is the value that code 0 stands for, rounded to bf16.

    The block's minimum falls on the lowest code and its maximum on the highest.
    """
    low = tl.min(tl.where(live_NB, x_NB, float("inf")), axis=1)
    high = tl.max(tl.where(live_NB, x_NB, float("-inf")), axis=1)
    some = low <= high
    low, high = tl.where(some, low, 0.0), tl.where(some, high, 0.0)
    zeros = low + (high - low) * ((F.max_value + 1) / (2 * F.max_value + 1))
    zeros = to_float(bf16_bits(zeros) << 16)
    # + 0.0, because the larger of 0 and -0 may be either.
    return zeros, tl.maximum(high - zeros, (zeros - low) * (F.max_value / (F.max_value + 1))) + 0.0


@triton.jit
def choose_scales(x_NB, left, need, bad, row_scale, F: tl.constexpr):
    """(codes, reciprocals), [N]: plain or, with `search`, of the candidate of least squared error."""
    codes, reciprocals = scale_codes(need, bad, row_scale, F, 0)
    if len(F.candidates) > 1:
        least = squared_error(x_NB, left, codes, reciprocals, row_scale, F)
        for i in tl.static_range(1, len(F.candidates)):
            its_codes, its_reciprocals = scale_codes(need, bad, row_scale, F, i)
            error = squared_error(x_NB, left, its_codes, its_reciprocals, row_scale, F)
            better = error < least
            codes = tl.where(better, its_codes, codes)
            reciprocals = tl.where(better, its_reciprocals, reciprocals)
            least = tl.where(better, error, least)
    return codes, reciprocals


@triton.jit
def squared_error(x_NB, left, codes, reciprocals, row_scale, F: tl.constexpr):
    """fp32 [N], relative to the block's own scale of things, so that squares neither overflow nor vanish."""
    codes_NB = clean_codes(element_codes(x_NB * reciprocals[:, None], F), F)
    values_NB = element_values(codes_NB, F)
    difference_NB = x_NB - values_NB * scale_values(codes, row_scale, F)[:, None]
    error_NB = difference_NB * reciprocal_of_power_below(tl.max(tl.abs(x_NB), axis=1))[:, None]
    if F.levels is not None:  # others have a zero for what fills a row's last block up
        N: tl.constexpr = x_NB.shape[0]
        error_NB = tl.where(before_end(left, N, F.block), error_NB, 0.0)
    return pairwise_sum(error_NB * error_NB, F.block)
