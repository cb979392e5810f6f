# SPDX-License-Identifier: Apache-2.0
"""The ground truth of every codec, in plain torch: clear first, and as fast as eager torch allows.

Encoding is a chain of stages, transform -> scale -> quantize -> pack, and decoding is the chain reversed. An option
acts in exactly one of them: `hadamard` in transform; `spike`, `asym`, `search` and the rounding rules in scale.
All arithmetic is fp32, one rounding an operation. Legend: R rows, H hidden, N blocks a row, B values a block.
"""

from collections.abc import Sequence

import torch

from . import message
from .formats import BF16_MAX, SMALLEST_NORMAL, Format, Integer, Levels, Minifloat
from .scales import candidates, lookup, minifloat_codes, row_scale, scale_codes, scale_values, table

# Rows are worked on in tiles of about this many values, which stay in a core's cache: eager torch on a fresh large
# tensor spends most of its time on page faults (bf16 to fp32, 4 M values, one thread: 6.6 ms whole, 0.4 ms in tiles).
TILE_VALUES = 1 << 16


def encode(x_RH: torch.Tensor, fmt: Format, out: torch.Tensor) -> None:
    """`[rows, hidden]` of fp32, bf16 or fp16 into `out`, a uint8 message."""
    rows, hidden = x_RH.shape
    layout = message.layout(fmt, rows, hidden)
    # The padding of sections travels too and must be the same in every run.
    out.zero_()
    for first, last in _tiles(rows, hidden, x_RH.device):
        _write_tile(out, layout, first, _encode_tile(x_RH[first:last].float(), fmt))


def encode_slices(x_RH: torch.Tensor, fmt: Format, rows: Sequence[int], out: torch.Tensor) -> None:
    """The messages of consecutive slices of `x_RH`, so many rows each, one after another into `out`."""
    end = 0
    for part in x_RH.split(rows):
        start, end = end, end + message.layout(fmt, *part.shape).nbytes
        encode(part, fmt, out[start:end])


def sum_encode(parts_NRH: torch.Tensor, fmt: Format, rows: Sequence[int], out: torch.Tensor) -> None:
    """`encode_slices` of the fp32 sum of N tensors, `[N, rows, hidden]`, in their order, each value as it is."""
    total_RH = parts_NRH[0].float()
    for part_RH in parts_NRH[1:]:
        total_RH = total_RH + part_RH
    encode_slices(total_RH, fmt, rows, out)


def decode_sum(messages: torch.Tensor, fmt: Format, out: torch.Tensor) -> None:
    """uint8 `[ranks, nbytes]` to the sum `out` `[rows, hidden]`: fp32, in rank order, rounded once to its dtype.

    One message alone saturates where `out` is fp16, which cannot hold what a power-of-two scale may round 65504 up to.
    A sum becomes infinite where fp16 does not reach, as it does without codecs.
    """
    limit = 65504.0 if len(messages) == 1 and out.dtype == torch.float16 else torch.inf
    _decode_sum(messages, fmt, limit, out)


def decode_slices(slots: torch.Tensor, fmt: Format, rows: Sequence[int], out: torch.Tensor, each: int = 1) -> None:
    """Messages, one at the start of each slot of uint8 `[slices * each, bytes]`, to the rows of `out`.

    Every slice is the sum of `each` messages, in their order. What a message leaves of its slot is not read. Nothing
    saturates: these are sums.
    """
    for of_slice, part in zip(slots.split(each), out.split(rows), strict=True):
        _decode_sum(of_slice, fmt, torch.inf, part)


def decode_sum_encode(
    messages: torch.Tensor, shape: tuple[int, int], fmt: Format, second: Format, out: torch.Tensor
) -> None:
    """The middle of the two-step all-reduce: the fp32 sum of `messages`, `shape` = (rows, hidden), encoded again.

    Where both formats transform blocks of one size, the transformed sum is encoded as it stands.
    """
    rows, hidden = shape
    layout, second_layout = message.layout(fmt, *shape), message.layout(second, *shape)
    transformed = fmt.hadamard and second.hadamard and fmt.block == second.block
    out.zero_()
    for first, last in _tiles(rows, hidden, messages.device):
        total = _sum_tile(messages, layout, first, last, fmt)
        if not transformed:
            total = _transform_back(total, fmt)
        _write_tile(out, second_layout, first, _encode_tile(total, second, transformed))


def _decode_sum(messages: torch.Tensor, fmt: Format, limit: float, out: torch.Tensor) -> None:
    rows, hidden = out.shape
    layout = message.layout(fmt, rows, hidden)
    for first, last in _tiles(rows, hidden, messages.device):
        total = _transform_back(_sum_tile(messages, layout, first, last, fmt), fmt)
        out[first:last] = total.clamp(-limit, limit) if limit < torch.inf else total


def _tiles(rows: int, hidden: int, device: torch.device):
    step = rows if device.type != "cpu" else TILE_VALUES // hidden
    return ((first, min(first + max(step, 1), rows)) for first in range(0, rows, max(step, 1)))


def _write_tile(out: torch.Tensor, layout: message.Layout, first: int, fields: dict[str, torch.Tensor]) -> None:
    for field, codes in fields.items():
        message.write(out, layout.fields[field], first, codes)


def _encode_tile(x_RH: torch.Tensor, fmt: Format, transformed: bool = False) -> dict[str, torch.Tensor]:
    """The codes of every field of the message; fp32 in. transformed: the blocks of `x_RH` are so already."""
    hidden = x_RH.shape[1]
    x_RH = _clean(x_RH, fmt)
    x_RNB = _blocks(x_RH, fmt.block) if transformed else _transform(x_RH, fmt)
    peak_RN = x_RNB.abs().amax(dim=-1)
    bad_RN = peak_RN.isnan()
    fields = {}

    live = _live(x_RNB.shape, hidden, x_RNB.device)
    if fmt.spike:
        fields["spike_value"], fields["spike_index"], live = _take_spikes(x_RNB, live, bad_RN)
    if fmt.asym:
        zero_RN, need_RN = _zero_points(x_RNB, live, fmt)
        fields["zero_point"] = torch.where(bad_RN, 0.0, zero_RN).to(torch.bfloat16).view(torch.int16)
        x_RNB = torch.where(live, x_RNB - zero_RN[..., None], 0.0)
    elif fmt.spike:
        x_RNB = torch.where(live, x_RNB, 0.0)
        need_RN = x_RNB.abs().amax(dim=-1)
    else:
        need_RN = peak_RN
    need_RN = torch.where(bad_RN, torch.nan, need_RN)

    rows_R1 = row_scale(need_RN, fmt) if fmt.scale.row_scaled else None
    if rows_R1 is not None:
        fields["row_scale"] = rows_R1.view(torch.int32)
    fields["scale"], reciprocals_RN = _choose_scales(x_RNB, live, need_RN, rows_R1, fmt)
    codes_RNB = _quantize(x_RNB * reciprocals_RN[..., None], fmt) * ~bad_RN[..., None]
    fields["payload"] = codes_RNB.flatten(1)[:, :hidden]
    return fields


def _sum_tile(messages: torch.Tensor, layout: message.Layout, first: int, last: int, fmt: Format) -> torch.Tensor:
    """fp32 `[last - first, hidden]`: the messages' sum, in their order, before the transform back."""
    total = _decode_tile(messages[0], layout, first, last, fmt)
    for other in messages[1:]:
        total = total + _decode_tile(other, layout, first, last, fmt)
    return total


def _decode_tile(source: torch.Tensor, layout: message.Layout, first: int, last: int, fmt: Format) -> torch.Tensor:
    """fp32 `[last - first, hidden]`; with `hadamard`, transformed."""

    def field(name: str) -> torch.Tensor:
        return message.read(source, layout.fields[name], first, last)

    rows_R1 = field("row_scale").view(torch.float32) if fmt.scale.row_scaled else None
    scales_RN = scale_values(field("scale"), fmt, rows_R1)
    codes_RH = field("payload")
    y_RNB = _blocks(lookup(codes_RH, table(fmt.element.table, source.device)), fmt.block)
    y_RNB = y_RNB * scales_RN[..., None]
    if fmt.asym:
        y_RNB = y_RNB + field("zero_point").view(torch.bfloat16).float()[..., None]
    if fmt.spike:
        values = field("spike_value").view(torch.bfloat16).float().view(last - first, -1, 2)
        y_RNB.scatter_(2, field("spike_index").view(last - first, -1, 2).long(), values)
    return y_RNB.flatten(1)[:, : codes_RH.shape[1]]


# Transform.


def input_limit(fmt: Format) -> float:
    """The largest magnitude that is not cut.

    The distance of a value from its zero point must not pass fp32's range, nor the sums of two Hadamard transforms:
    where a scale has saturated, every place of a block may decode to a zero point as large as the first one's sum.
    """
    return BF16_MAX / (4 * fmt.block**2) if fmt.hadamard else BF16_MAX / 4 if fmt.asym else BF16_MAX


def _clean(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Infinities to NaN, subnormals to zeros of their sign, and the rest within what the later stages can hold."""
    limit = input_limit(fmt)
    x = x + x * 0.0  # 0 * infinity is NaN; -0 stays -0
    return (x * (x.abs() >= SMALLEST_NORMAL)).clamp(-limit, limit)


def _transform(x_RH: torch.Tensor, fmt: Format) -> torch.Tensor:
    x_RNB = _blocks(x_RH, fmt.block)
    return _hadamard(x_RNB, x_RH.shape[1]) if fmt.hadamard else x_RNB


def _transform_back(y_RH: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The transform is linear: one for a sum, not one for each summand."""
    return _transform(y_RH, fmt).flatten(1)[:, : y_RH.shape[1]] if fmt.hadamard else y_RH


def _blocks(x_RH: torch.Tensor, block: int) -> torch.Tensor:
    """`[rows, blocks, block]`; the last block of a row is filled up with zeros."""
    short = -x_RH.shape[1] % block
    x = torch.nn.functional.pad(x_RH, (0, short)) if short else x_RH
    return x.view(x.shape[0], x.shape[1] // block, block)


def _hadamard(x_RNB: torch.Tensor, hidden: int) -> torch.Tensor:
    """Orthonormal Walsh-Hadamard transform of every whole block, its own inverse; a short last block stays as it is.

    Butterflies over neighbours first, then at distances 2, 4, ..., and one final multiplication.
    """
    block = x_RNB.shape[-1]
    whole = x_RNB[:, : hidden // block]
    y, distance = whole.reshape(-1, block), 1
    while distance < block:
        pairs = y.view(-1, block // (2 * distance), 2, distance)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        y = torch.stack((a + b, a - b), dim=2)
        distance *= 2
    y = y.view(whole.shape) * block**-0.5
    return torch.cat((y, x_RNB[:, hidden // block :]), dim=1) if hidden % block else y


# Scale.


def _live(shape: torch.Size, hidden: int, device: torch.device) -> torch.Tensor:
    """bool `[1, blocks, block]`: which places hold values of the row and not filling."""
    return (torch.arange(shape[1] * shape[2], device=device) < hidden).view(1, shape[1], shape[2])


def _take_spikes(x_RNB: torch.Tensor, live: torch.Tensor, bad_RN: torch.Tensor) -> tuple:
    """Each block's minimum and maximum as bf16 bits and places, both `[rows, 2 * blocks]`, and what stays live.

    arXiv 2508.03760 (Flash Communication V2) names the method; the encoding here is ours.
    The first of equals is taken. A block with NaN has NaN at place 0, twice, so that nothing finite is put back.
    """
    lowest = x_RNB.masked_fill(~live, torch.inf).argmin(dim=-1)
    highest = x_RNB.masked_fill(~live, -torch.inf).argmax(dim=-1)
    places = torch.stack((lowest, highest), dim=-1).masked_fill(bad_RN[..., None], 0)
    values = x_RNB.gather(-1, places).to(torch.bfloat16)
    bits = values.view(torch.int16).masked_fill(bad_RN[..., None], 0x7FC0)
    live = live.expand(x_RNB.shape).scatter(-1, places, False)
    return bits.flatten(1), places.flatten(1).to(torch.uint8), live


def _zero_points(x_RNB: torch.Tensor, live: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """(zero points, needs), `[rows, blocks]`. A zero point is the value that code 0 stands for, rounded to bf16.

    It is placed so that the block's minimum falls on the lowest code and its maximum on the highest.
    """
    top = fmt.element.max_value
    some = live.any(dim=-1)
    low = torch.where(some, x_RNB.masked_fill(~live, torch.inf).amin(dim=-1), 0.0)
    high = torch.where(some, x_RNB.masked_fill(~live, -torch.inf).amax(dim=-1), 0.0)
    zero = (low + (high - low) * ((top + 1) / (2 * top + 1))).to(torch.bfloat16).float()
    # + 0.0, because the larger of 0 and -0 is either, by where a value stands in a vector register.
    return zero, torch.maximum(high - zero, (zero - low) * (top / (top + 1))) + 0.0


def _choose_scales(
    x_RNB: torch.Tensor, live: torch.Tensor, need_RN: torch.Tensor, rows_R1: torch.Tensor | None, fmt: Format
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, reciprocals), `[rows, blocks]`: plain or, with `search`, of the candidate of least squared error."""
    first, *others = candidates(fmt)
    codes, reciprocals = scale_codes(need_RN, fmt, first, rows_R1)
    if not others:
        return codes, reciprocals
    least = _squared_error(x_RNB, live, codes, reciprocals, rows_R1, fmt)
    for candidate in others:
        its_codes, its_reciprocals = scale_codes(need_RN, fmt, candidate, rows_R1)
        error = _squared_error(x_RNB, live, its_codes, its_reciprocals, rows_R1, fmt)
        better = error < least
        codes = torch.where(better, its_codes, codes)
        reciprocals = torch.where(better, its_reciprocals, reciprocals)
        least = torch.where(better, error, least)
    return codes, reciprocals


def _squared_error(
    x_RNB: torch.Tensor,
    live: torch.Tensor,
    codes: torch.Tensor,
    reciprocals: torch.Tensor,
    rows_R1: torch.Tensor | None,
    fmt: Format,
) -> torch.Tensor:
    """fp32 `[rows, blocks]`; neighbours are added first, then pairs of pairs: every backend must get these bits."""
    # NaN may get a code that the element lacks; its error is NaN, whichever value is looked up.
    quantized = _quantize(x_RNB * reciprocals[..., None], fmt) & (2**fmt.element.bits - 1)
    values = lookup(quantized, table(fmt.element.table, x_RNB.device)) * scale_values(codes, fmt, rows_R1)[..., None]
    # Relative to the block's own scale of things, so that squares neither overflow nor vanish.
    error = ((x_RNB - values) * _power_below(x_RNB)[..., None]).square()
    if isinstance(fmt.element, Levels):  # others have a zero for what fills a row's last block up
        error = error.masked_fill(~live, 0.0)
    while error.shape[-1] > 1:
        error = error[..., 0::2] + error[..., 1::2]
    return error[..., 0]


def _power_below(x_RNB: torch.Tensor) -> torch.Tensor:
    """fp32 `[rows, blocks]`: the reciprocal of the power of two at or below each block's maximum."""
    bits = x_RNB.abs().amax(dim=-1).view(torch.int32)
    return ((254 << 23) - (bits & 0x7F800000)).clamp(1 << 23, 253 << 23).view(torch.float32)


# Quantize.


def _quantize(y: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Codes, uint8, of scaled values: nearest, ties to even, saturating. Integers alone lose a sign of zero."""
    element = fmt.element
    if not isinstance(element, Integer):
        sign = (y.view(torch.int32) >> 31) & (1 << (element.bits - 1))
        magnitude = y.abs()
        codes = (
            minifloat_codes(magnitude, element)
            if isinstance(element, Minifloat)
            else torch.bucketize(magnitude, table(element.thresholds, y.device), out_int32=True)
        )
        return (codes | sign).to(torch.uint8)
    lowest = -element.max_value - 1 if fmt.asym else -element.max_value
    codes = y.round().clamp_(lowest, element.max_value).to(torch.int8).view(torch.uint8)
    return codes & (2**element.bits - 1)
