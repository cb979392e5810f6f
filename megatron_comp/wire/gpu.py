"""The Triton backend: a codec's name and a tensor's shape made into what the kernels take."""

from functools import lru_cache

import torch

from ..kernels.decode_sum import decode_sum as _decode_sum
from ..kernels.decode_sum_encode import decode_sum_encode as _decode_sum_encode
from ..kernels.encode import encode as _encode
from ..kernels.format import Field, KernelFormat, SmallFloat
from . import message, scales
from .formats import Format, Minifloat, PowerOfTwo, SmallFloatScale
from .reference import input_limit


def encode(x_RH: torch.Tensor, fmt: Format, out: torch.Tensor) -> None:
    """`[rows, hidden]` of fp32, bf16 or fp16 into `out`, a uint8 message."""
    x_RH = x_RH if x_RH.stride(1) == 1 else x_RH.contiguous()
    flat = _is_flat(fmt, x_RH.shape) and x_RH.is_contiguous()
    x_RH = x_RH.view(1, -1) if flat else x_RH
    at, align = _sections(fmt, x_RH.shape)
    _encode(x_RH, out, at, kernel_format(fmt), align)


def decode_sum(messages: torch.Tensor, fmt: Format, out: torch.Tensor) -> None:
    """uint8 `[ranks, nbytes]` to the sum `out` `[rows, hidden]`: fp32, in rank order, rounded once to its dtype."""
    out = out.view(1, -1) if _is_flat(fmt, out.shape) else out
    at, align = _sections(fmt, out.shape)
    _decode_sum(messages, at, out, kernel_format(fmt), align)


def decode_sum_encode(
    messages: torch.Tensor, shape: tuple[int, int], fmt: Format, second: Format, out: torch.Tensor
) -> None:
    """The middle of the two-step all-reduce: the fp32 sum of `messages`, `shape` = (rows, hidden), encoded again."""
    if _is_flat(fmt, shape) and _is_flat(second, shape):
        shape = (1, shape[0] * shape[1])
    (at, align), (out_at, out_align) = _sections(fmt, shape), _sections(second, shape)
    formats = kernel_format(fmt), kernel_format(second)
    _decode_sum_encode(messages, at, shape, formats[0], out, out_at, formats[1], min(align, out_align))


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
