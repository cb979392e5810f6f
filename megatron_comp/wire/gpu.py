"""The Triton backend: a codec's name and a tensor's shape made into what the kernels take."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch

from ..kernels.decode_sum import decode_sum as _decode_sum
from ..kernels.decode_sum_encode import decode_sum_encode as _decode_sum_encode
from ..kernels.encode import encode as _encode
from ..kernels.format import Field, KernelFormat, SmallFloat
from ..kernels.slices import decode_slices as _decode_slices
from ..kernels.slices import encode_slices as _encode_slices
from . import message, scales
from .formats import Format, Minifloat, PowerOfTwo, SmallFloatScale
from .reference import input_limit


def encode(x_RH: torch.Tensor, fmt: Format, out: torch.Tensor) -> None:
    """`[rows, hidden]` of fp32, bf16 or fp16 into `out`, a uint8 message."""
    x_RH = x_RH if x_RH.stride(1) == 1 else x_RH.contiguous()
    flat = _is_flat(fmt, x_RH.shape) and x_RH.is_contiguous()
    x_RH = x_RH.view(1, -1) if flat else x_RH
    at, align = _sections(fmt, x_RH.shape)
    with _on_device_of(out):
        _encode(x_RH, out, at, kernel_format(fmt), align)


def decode_sum(messages: torch.Tensor, fmt: Format, out: torch.Tensor) -> None:
    """uint8 `[ranks, nbytes]` to the sum `out` `[rows, hidden]`: fp32, in rank order, rounded once to its dtype."""
    out = out.view(1, -1) if _is_flat(fmt, out.shape) else out
    at, align = _sections(fmt, out.shape)
    with _on_device_of(out):
        _decode_sum(_readable(messages), at, out, kernel_format(fmt), align)


def decode_sum_encode(
    messages: torch.Tensor, shape: tuple[int, int], fmt: Format, second: Format, out: torch.Tensor
) -> None:
    """The middle of the two-step all-reduce: the fp32 sum of `messages`, `shape` = (rows, hidden), encoded again."""
    if _is_flat(fmt, shape) and _is_flat(second, shape):
        shape = (1, shape[0] * shape[1])
    (at, align), (out_at, out_align) = _sections(fmt, shape), _sections(second, shape)
    formats = kernel_format(fmt), kernel_format(second)
    with _on_device_of(out):
        _decode_sum_encode(_readable(messages), at, shape, formats[0], out, out_at, formats[1], min(align, out_align))


def encode_slices(x_RH: torch.Tensor, fmt: Format, rows: tuple[int, ...], out: torch.Tensor) -> None:
    """The messages of consecutive slices of `[rows, hidden]`, of so many `rows` each, one after another in `out`.

    One launch where slices differ by one row at most, longer ones first; otherwise one for each slice.
    """
    if _are_even(rows):
        with _on_device_of(out):
            _encode_slices(x_RH.contiguous(), out, *_slices(fmt, x_RH.shape, len(rows)))
        return
    sizes = [message.layout(fmt, count, x_RH.shape[1]).nbytes for count in rows]
    for part, its_message in zip(x_RH.split(rows), out.split(sizes), strict=True):
        if len(part):
            encode(part, fmt, its_message)


def decode_slices(slots: torch.Tensor, fmt: Format, rows: tuple[int, ...], out: torch.Tensor) -> None:
    """uint8 `[slices, bytes of the longest message]` to contiguous `out` `[rows, hidden]`, in one launch.

    The slices are those of an all-reduce: they differ by one row at most, longer ones first."""
    assert _are_even(rows), "slices of an all-reduce"
    with _on_device_of(out):
        _decode_slices(_readable(slots).contiguous(), out, *_slices(fmt, out.shape, len(rows)))


def _on_device_of(x: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, whatever its tensors are on."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def _readable(messages: torch.Tensor) -> torch.Tensor:
    """Kernels read words: messages that do not start on 16 bytes, as slices of somebody's bytes may, are copied.

    All sections then start on 16 bytes too. What comes from a collective, or from `encode`, is never copied.
    """
    starts = (messages.data_ptr(), messages.stride(0) if len(messages) > 1 else 0)
    return messages if messages.stride(1) == 1 and not any(at % 16 for at in starts) else _copied(messages)


def _copied(messages: torch.Tensor) -> torch.Tensor:
    room = -(-messages.shape[1] // message.ALIGNMENT) * message.ALIGNMENT
    copy = messages.new_empty(len(messages), room)[:, : messages.shape[1]]
    return copy.copy_(messages)


def _are_even(rows: tuple[int, ...]) -> bool:
    return rows[0] > 0 and rows[0] - rows[-1] <= 1 and all(a >= b for a, b in zip(rows, rows[1:]))


@lru_cache(maxsize=4096)
def _slices(fmt: Format, shape: tuple[int, int], slices: int) -> tuple:
    """What the kernels take of a tensor that is dealt out to `slices` ranks, the longer slices first."""
    longs, hidden = shape[0] % slices or slices, shape[1]
    rows = -(-shape[0] // slices)
    short = (max(rows - 1, 1), hidden)  # as if it had a row where it has none: nothing of it is read or written
    flat = _is_flat(fmt, (rows, hidden)) and _is_flat(fmt, short) and rows * hidden < 1 << 31
    long = (1, rows * hidden) if flat else (rows, hidden)
    short = (1, short[0] * hidden) if flat else short
    (at, align), (short_at, short_align) = _sections(fmt, long), _sections(fmt, short)
    if rows == 1:
        short_at = (0,) * len(at)
    return longs, slices, rows, at, short_at, kernel_format(fmt), flat, min(align, short_align)


@lru_cache(maxsize=4096)
def _is_flat(fmt: Format, shape: tuple[int, int]) -> bool:
    """Whether all rows make the same message as one long row: they share no block, byte or scale, and pad nothing."""
    sections = [s for field in message.layout(fmt, *shape).fields.values() for s in field]
    whole_bytes = all(section.columns * section.width % 8 == 0 for section in sections)
    return whole_bytes and shape[1] % fmt.block == 0 and not fmt.scale.row_scaled


@lru_cache(maxsize=4096)
def _sections(fmt: Format, shape: tuple[int, int]) -> tuple[tuple[int, ...], int]:
    """(byte offsets of all sections and of the message's end, bytes that every row of every section starts on)."""
    layout = message.layout(fmt, *shape)
    offsets = tuple(section.offset for sections in layout.fields.values() for section in sections)
    if shape[0] == 1:
        align = message.ALIGNMENT  # the only row starts where its section does
    else:
        # Row scales are stored one by one, as what they are.
        planes = [section for name, sections in layout.fields.items() if name != "row_scale" for section in sections]
        align = next(align for align in (16, 4, 1) if all(plane.row_bytes % align == 0 for plane in planes))
    return (*offsets, layout.nbytes), align


@lru_cache
def kernel_format(fmt: Format) -> KernelFormat:
    element, scale = fmt.element, fmt.scale
    power, small = isinstance(scale, PowerOfTwo), isinstance(scale, SmallFloatScale)
    fields, first = {}, 0
    for name, sections in message.layout(fmt, 1, fmt.block).fields.items():
        fields[name] = Field(first, tuple((section.shift, section.width) for section in sections))
        first += len(sections)
    return KernelFormat(
        element=_small_float(element) if isinstance(element, Minifloat) else None,
        bits=element.bits,
        mantissa_bits=element.mantissa_bits,
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
        **{name: fields.get(name) for name in message.FIELDS},
        exact_products=not fmt.hadamard and not scale.row_scaled and scale.bits < 32,
    )


def _small_float(fmt: Minifloat) -> SmallFloat:
    return SmallFloat(fmt.mantissa_bits, fmt.bias, fmt.max_value)
