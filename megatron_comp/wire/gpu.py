# SPDX-License-Identifier: Apache-2.0
"""The Triton backend: a codec's name and a tensor's shape made into what the kernels take."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from ..kernels.decode_sum import decode_sum as _decode_sum
from ..kernels.decode_sum_encode import decode_sum_encode as _decode_sum_encode
from ..kernels.encode import encode as _encode
from ..kernels.format import TILE, Field, KernelFormat, LevelTable, SmallFloat
from ..kernels.slices import as_arguments
from ..kernels.sum_encode import sum_encode as _sum_encode
from . import message, scales
from .formats import SMALLEST_NORMAL, Format, Integer, Levels, Minifloat, PowerOfTwo, SmallFloatScale
from .reference import input_limit

if TYPE_CHECKING:
    from .backends import SumKind

# Launches whose arguments are kept: as many as plans of sums (`plan.py`).
KNOWN_LAUNCHES = 4096


def encode(x_RH: torch.Tensor, fmt: Format, out: torch.Tensor) -> None:
    """`[rows, hidden]` of fp32, bf16 or fp16 into `out`, a uint8 message."""
    encode_slices(x_RH, fmt, (x_RH.shape[0],), out)


def encode_slices(x_RH: torch.Tensor, fmt: Format, rows: Sequence[int], out: torch.Tensor) -> None:
    """The messages of consecutive slices of `[rows, hidden]`, one after another in `out`; one launch.

    rows: of each slice; may be 0, and all together are those of `x_RH`.
    """
    x_RH = x_RH if x_RH.stride(1) == 1 else x_RH.contiguous()
    how = _how_to_encode(fmt, tuple(rows), x_RH.shape[1], x_RH.is_contiguous())
    with _on_device_of(x_RH):
        _encode(x_RH, out, *how)


def sum_encode(parts: torch.Tensor, fmt: Format, rows: Sequence[int], out: torch.Tensor) -> None:
    """The same of the fp32 sum of `parts` `[ranks, rows, hidden]`, which stays in registers; one launch."""
    how = _how_to_encode(fmt, tuple(rows), parts.shape[2], True)
    with _on_device_of(parts):
        _sum_encode(parts.contiguous(), out, *how)


def decode_sum(messages: torch.Tensor, fmt: Format, out: torch.Tensor) -> None:
    """uint8 `[ranks, nbytes]` to the sum `out` `[rows, hidden]`: fp32, in rank order, rounded once to its dtype.

    One message alone saturates at the largest fp16; sums become infinite, as stock sums do.
    """
    alone = len(messages) == 1 and out.dtype == torch.float16
    _decode(messages, fmt, (out.shape[0],), out, len(messages), alone)


def decode_slices(slots: torch.Tensor, fmt: Format, rows: Sequence[int], out: torch.Tensor, each: int = 1) -> None:
    """uint8 `[slices * each, slot_bytes]`, a message at the start of each slot, to contiguous `out` `[rows, hidden]`.

    rows: of each slice, the sum of `each` messages; may be 0. One launch. What messages leave of their slots is never
    read. Nothing saturates: these are sums.
    """
    _decode(slots, fmt, tuple(rows), out, each, False)


def warm_up(kind: "SumKind", device: torch.device) -> None:
    """Launches each kernel of such sums once, on small tensors: Triton compiles it here and not in the first sum."""
    first, hidden = kind.first, kind.hidden
    for rows in (1, 2):  # of a slice: a message of one row is aligned as no other is
        sent = (rows,) if kind.algorithm == "gather_sum" else (rows,) * kind.ranks
        x = torch.zeros(kind.mates, sum(sent), hidden, dtype=kind.dtype, device=device)
        messages = _messages(first, kind.ranks, rows, hidden, device)
        if kind.mates == 1:
            encode_slices(x[0], first, sent, messages.view(-1))
        else:
            sum_encode(x, first, sent, messages.view(-1))
        if kind.algorithm == "reduce_scatter":
            decode_sum(messages, first, x[0, :rows])
            continue
        owned, last, each = sent * kind.shares, first, kind.ranks
        if kind.algorithm == "two_step":
            last, each = kind.second, 1
            decode_sum_encode(messages, (rows, hidden), first, last, _messages(last, 1, rows, hidden, device)[0])
        slots = _messages(last, len(owned) * each, rows, hidden, device)
        decode_slices(slots, last, owned, x.new_empty(sum(owned), hidden), each)


def _messages(fmt: Format, ranks: int, rows: int, hidden: int, device: torch.device) -> torch.Tensor:
    nbytes = message.layout(fmt, rows, hidden).nbytes
    return torch.zeros(ranks, nbytes, dtype=torch.uint8, device=device)


def _decode(messages: torch.Tensor, fmt: Format, rows: tuple[int, ...], out: torch.Tensor, ranks: int, clamp: bool):
    how = _how_to_decode(fmt, rows, out.shape[1])
    with _on_device_of(out):
        _decode_sum(_on_words(messages), out, ranks, clamp, *how)


def decode_sum_encode(
    messages: torch.Tensor, shape: tuple[int, int], fmt: Format, second: Format, out: torch.Tensor
) -> None:
    """The middle of the two-step all-reduce: the fp32 sum of `messages`, `shape` = (rows, hidden), encoded again.

    Where both formats transform blocks of one size, the sum is encoded as it stands: transformed.
    """
    how = _how_to_encode_sums(fmt, second, *shape)
    with _on_device_of(out):
        _decode_sum_encode(_on_words(messages), out, *how)


def _on_words(messages: torch.Tensor) -> torch.Tensor:
    """The messages, copied if they do not start on words of 4 bytes, which is what kernels read."""
    words = messages.data_ptr() % 4 == 0 and messages.stride(0) % 4 == 0 and messages.stride(1) == 1
    return messages if words else messages.clone(memory_format=torch.contiguous_format)


def _on_device_of(x: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    return torch.cuda.device(x.device) if elsewhere else nullcontext()


# What launches take besides tensors follows from format and shape. One look-up finds all of it, because each of them
# takes two microseconds: it hashes a format.


@lru_cache(maxsize=KNOWN_LAUNCHES)
def _how_to_encode(fmt: Format, rows: tuple[int, ...], hidden: int, contiguous: bool) -> tuple:
    """The arguments of `kernels.encode` that follow its tensors."""
    flat = contiguous and _is_flat(fmt, hidden)
    units = [message.layout(fmt, count, hidden).nbytes // message.ALIGNMENT for count in rows]
    starts = as_arguments(accumulate(units[:-1], initial=0))
    programs = _programs(max(rows), hidden, flat, fmt.scale.row_scaled)
    return starts, _first_rows(rows), programs, kernel_format(fmt), flat, _align(fmt, max(rows), hidden, flat)


@lru_cache(maxsize=KNOWN_LAUNCHES)
def _how_to_decode(fmt: Format, rows: tuple[int, ...], hidden: int) -> tuple:
    """The last arguments of `kernels.decode_sum`."""
    flat, longest = _is_flat(fmt, hidden), max(rows)
    programs, align = _programs(longest, hidden, flat, False), _align(fmt, longest, hidden, flat)
    return _first_rows(rows), programs, kernel_format(fmt), flat, align


@lru_cache(maxsize=KNOWN_LAUNCHES)
def _how_to_encode_sums(fmt: Format, second: Format, rows: int, hidden: int) -> tuple:
    """The arguments of `kernels.decode_sum_encode` that follow its tensors."""
    flat = _is_flat(fmt, hidden) and _is_flat(second, hidden)
    align = min(_align(fmt, rows, hidden, flat), _align(second, rows, hidden, flat))
    first, last = kernel_format(fmt), kernel_format(second)
    if fmt.hadamard and second.hadamard and fmt.block == second.block:
        first, last = replace(first, hadamard=False), replace(last, hadamard=False)
    programs = _programs(rows, hidden, flat, second.scale.row_scaled)
    return _first_rows((rows,)), hidden, first, last, programs, flat, align


def _first_rows(rows: tuple[int, ...]) -> tuple[int, ...]:
    """First row of each slice and all rows, as kernels take them."""
    return as_arguments(accumulate(rows, initial=0))


def _programs(rows: int, hidden: int, flat: bool, by_row: bool) -> int:
    """For a slice: one each for a row, or for a tile of a row, or for a tile of all rows."""
    return rows if by_row else -(-rows * hidden // TILE) if flat else rows * -(-hidden // TILE)


def _is_flat(fmt: Format, hidden: int) -> bool:
    """Whether all rows make the same message as one long row: they share no block, byte or scale, and pad nothing."""
    sections = [s for field in message.layout(fmt, 1, hidden).fields.values() for s in field]
    whole_bytes = all(section.columns * section.width % 8 == 0 for section in sections)
    return whole_bytes and hidden % fmt.block == 0 and not fmt.scale.row_scaled


def _align(fmt: Format, rows: int, hidden: int, flat: bool) -> int:
    """Bytes that every row of every section starts on, in slices of up to `rows` rows."""
    if flat or rows == 1:
        return message.ALIGNMENT  # the only row starts where its section does
    # Row scales are stored one by one, as what they are.
    fields = message.layout(fmt, 1, hidden).fields
    planes = [section for name, sections in fields.items() if name != "row_scale" for section in sections]
    return next(align for align in (16, 4, 1) if all(plane.row_bytes % align == 0 for plane in planes))


@lru_cache
def kernel_format(fmt: Format) -> KernelFormat:
    element, scale = fmt.element, fmt.scale
    power, small = isinstance(scale, PowerOfTwo), isinstance(scale, SmallFloatScale)
    fields, first, sections_of_all = {}, 0, []
    units = {field: unit for field, (unit, _) in message.field_widths(fmt).items()}
    for name, sections in message.layout(fmt, 1, fmt.block).fields.items():
        planes = tuple((section.shift, section.width) for section in sections)
        fields[name] = Field(
            first,
            planes,
            flip=(1 << element.bits - 1) if name == "payload" and isinstance(element, Integer) else 0,
        )
        sections_of_all += [(units[name], section.width) for section in sections]
        first += len(sections)
    return KernelFormat(
        element=_small_float(element) if isinstance(element, Minifloat) else None,
        levels=_level_table(element) if isinstance(element, Levels) else None,
        bits=element.bits,
        mantissa_bits=0 if isinstance(element, Levels) else element.mantissa_bits,
        max_value=element.max_value,
        max_exponent=element.max_exponent,
        block=fmt.block,
        scale_kind="power" if power else "small" if small else scale.name,
        scale_float=_small_float(scale.float) if small else None,
        scale_bias=scale.bias if power else 0,
        scale_nan_code=scale.nan_code,
        scale_underflow_to_zero=power and scale.underflow_to_zero,
        largest_scale_code=scales.largest_code(fmt) if power else 0,
        smallest_scale=0.0 if power or small else scale.smallest,
        largest_scale=0.0 if power or small else scales.largest_scale(fmt),
        row_scaled=scale.row_scaled,
        row_scale_divisor=scale.float.max_value * element.max_value if small else 0.0,
        smallest_row_scale=scales.SMALLEST_ROW_SCALE,
        rule=fmt.rule,
        candidates=scales.candidates(fmt),
        asym=fmt.asym,
        hadamard=fmt.hadamard,
        spike=fmt.spike,
        limit=input_limit(fmt),
        sees_subnormals=_sees_subnormals(fmt),
        sections=tuple(sections_of_all),
        **{name: fields.get(name) for name in message.FIELDS},  # type: ignore[arg-type] # payload and scale are there
        exact_products=not fmt.hadamard and not scale.row_scaled and scale.bits < 32,
    )


def _sees_subnormals(fmt: Format) -> bool:
    """Whether a message could tell subnormal inputs from zeros: not if its smallest scale is far above such numbers."""
    if fmt.hadamard or fmt.asym or fmt.spike or fmt.search or fmt.scale.row_scaled:
        return True
    if fmt.scale.bits > 8:
        return fmt.scale.smallest > 0  # to which scales are raised; fp16, without it, begins at 2^-24
    return min(value for value in fmt.scale.table if value > 0) < SMALLEST_NORMAL * 2**64


def _small_float(fmt: Minifloat) -> SmallFloat:
    return SmallFloat(fmt.mantissa_bits, fmt.bias, fmt.max_value)


def _level_table(element: Levels) -> LevelTable:
    fours = [element.magnitudes[k : k + 4] for k in range(0, len(element.magnitudes), 4)]
    words = tuple(int.from_bytes(bytes(four), "little") for four in fours)
    return LevelTable(words, element.unit, element.thresholds)
