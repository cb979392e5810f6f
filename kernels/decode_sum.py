"""Messages of all ranks to the sum of what they carry: fp32 in rank order, rounded once, one tile a program.

Legend: N blocks of a tile, B values a block.
"""

import torch
import triton
import triton.language as tl

from .blocks import hadamard
from .format import TILE, WARPS, KernelFormat
from .numbers import FP16_MAX, element_values, store_rounded, to_float
from .planes import load_field, places
from .scales import scale_values


def decode_sum(messages: torch.Tensor, at: tuple, out: torch.Tensor, fmt: KernelFormat, align: int) -> None:
    """`messages` [ranks, bytes], with sections at the offsets `at`, to their sum in contiguous `out` [rows, hidden]."""
    rows, hidden = out.shape
    programs = rows * triton.cdiv(hidden, TILE)
    decode_sum_kernel[(programs,)](
        messages,
        messages.stride(0),
        at,
        out,
        rows,
        hidden,
        fmt,
        len(messages),
        TILE,
        align,
        num_warps=WARPS,
        enable_fp_fusion=fmt.exact_products,
    )


@triton.jit
def decode_sum_kernel(
    messages,
    message_stride,
    at,
    out_ptr,
    rows,
    hidden,
    F: tl.constexpr,
    RANKS: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    # 32-bit: a 64-bit division takes a hundred instructions.
    program = tl.program_id(0)
    tiles = tl.cast(tl.cdiv(hidden, TILE), tl.int32)
    row, tile = (program // tiles).to(tl.int64), program % tiles
    HALF: tl.constexpr = out_ptr.dtype.element_ty == tl.float16
    total_NB, left = sum_tile(messages, message_stride, at, rows, hidden, row, tile, F, RANKS, TILE, ALIGN, HALF)
    place = tl.arange(0, TILE)
    out = out_ptr + row * hidden + tl.cast(tile, tl.int64) * TILE + place
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
    HALF: tl.constexpr,
):
    """(fp32 [N, B], how many of its values belong to the row): the sum of one tile over the ranks' messages.

    The values past the row's end are zeros, but with zero points and in blocks of NaN.
    """
    first = tl.cast(tile, tl.int64) * TILE
    left = tl.minimum(hidden - first, TILE).to(tl.int32)
    total_NB = decode_tile(messages, at, rows, hidden, row, first, left, F, TILE, ALIGN, HALF)
    for rank in tl.static_range(1, RANKS):
        message = messages + rank * message_stride.to(tl.int64)
        total_NB += decode_tile(message, at, rows, hidden, row, first, left, F, TILE, ALIGN, HALF)
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
    HALF: tl.constexpr,
):
    """fp32 [N, B]: one rank's values of a tile; finite in half precision (HALF) unless their block is NaN."""
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
    scales = scale_values(load_field(blocks, SCALE, N, ALIGN), row_scale, F)
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
    if F.hadamard:
        y_NB = hadamard(y_NB, left, B)
    if HALF:
        # Half precision cannot hold what a power-of-two scale may round 65504 up to.
        y_NB = tl.where(y_NB > FP16_MAX, FP16_MAX, tl.where(y_NB < -FP16_MAX, -FP16_MAX, y_NB))
    return y_NB
