# SPDX-License-Identifier: Apache-2.0
"""The scale stage of the reference codec: from what a block needs to a scale code, and from the code to its value.

Works on `need`, fp32 `[rows, blocks]`: the magnitude that a block's scale must bring to the element's largest value;
NaN where the block holds a NaN or an infinity. Exponents are taken from bits, never from a logarithm.
"""

import math
from functools import lru_cache

import torch

from .formats import BF16_MAX, Format, Minifloat, PowerOfTwo, SmallFloatScale, TorchFloatScale

# What `search` tries, the plain scale first; the first of equals wins. Power-of-two scales shift by whole exponents,
# others take these multiples: above 1 the block maximum meets a lower, denser part of the element's range.
SEARCH_SHIFTS = (0, -1, 1)
SEARCH_FACTORS = (1.0, 0.9375, 0.875, 0.8125, 0.75, 0.6875, 1.25, 1.5)

# Its product with the smallest e4m3 is fp32's smallest normal, so every scale that is not zero has a finite reciprocal.
SMALLEST_ROW_SCALE = 2.0**-117

_TORCH_FLOATS = {"fp16": (torch.float16, torch.int16), "bf16": (torch.bfloat16, torch.int16)}


def minifloat_codes(magnitude: torch.Tensor, fmt: Minifloat) -> torch.Tensor:
    """Nearest magnitude code, ties to even, int32; values past the largest saturate. `magnitude`: fp32, >= 0.

    Adding 2^(23 - mantissa_bits) times the value's own power of two rounds it to the format's grid in one fp32
    addition; below the format's smallest normal the power stays that of the smallest normal. NaN gives no useful code.
    """
    magnitude = magnitude.clamp(max=fmt.max_value)
    drop = 23 - fmt.mantissa_bits
    smallest_normal = (127 + 1 - fmt.bias) << 23
    power = magnitude.view(torch.int32).bitwise_and(0x7F800000).clamp_(min=smallest_normal)
    magic = power + (drop << 23)
    steps = (magnitude + magic.view(torch.float32)).view(torch.int32).sub_(magic)
    return steps.add_(power.sub_(smallest_normal).bitwise_right_shift_(drop))


def row_scale(need: torch.Tensor, fmt: Format) -> torch.Tensor:
    """fp32 `[rows, 1]`: maps the row's largest need to the largest block scale. Blocks with NaN do not count."""
    largest = need.nan_to_num(nan=0.0).amax(dim=1, keepdim=True)
    return _divide(largest, fmt.scale.float.max_value * fmt.element.max_value).clamp_(min=SMALLEST_ROW_SCALE)


def candidates(fmt: Format) -> tuple[float, ...]:
    if not fmt.search:
        return (0,) if isinstance(fmt.scale, PowerOfTwo) else (1.0,)
    return SEARCH_SHIFTS if isinstance(fmt.scale, PowerOfTwo) else SEARCH_FACTORS


def scale_codes(need: torch.Tensor, fmt: Format, candidate: float, rows: torch.Tensor | None) -> tuple:
    """(int32 codes, fp32 reciprocals to multiply values by), `[rows, blocks]`; reciprocal 0 where all becomes 0."""
    if isinstance(fmt.scale, PowerOfTwo):
        exponent = _exponent(need, fmt) + int(candidate)
        codes = (exponent + fmt.scale.bias).clamp_(0, largest_code(fmt))
        alive = exponent >= -fmt.scale.bias if fmt.scale.underflow_to_zero else None
    else:
        wanted = need if candidate == 1.0 else need * candidate
        wanted = _divide(wanted, fmt.element.max_value)
        codes = _small_codes(wanted, fmt, rows) if isinstance(fmt.scale, SmallFloatScale) else _torch_codes(wanted, fmt)
        alive = None
    codes = torch.where(need.isnan(), fmt.scale.nan_code, codes)
    scales = scale_values(codes, fmt, rows)
    reciprocals = torch.where(scales == 0, 0.0, 1.0 / scales)
    return codes, reciprocals if alive is None else reciprocals * alive


def scale_values(codes: torch.Tensor, fmt: Format, rows: torch.Tensor | None) -> torch.Tensor:
    """fp32 scales `[rows, blocks]` of the codes, times the row scales `[rows, 1]` where the format has them."""
    if fmt.scale.bits <= 8:
        values = lookup(codes, table(fmt.scale.table, codes.device))
        return values * rows if rows is not None else values
    if fmt.scale.bits == 32:
        return codes.view(torch.float32)
    floating, integer = _TORCH_FLOATS[fmt.scale.name]
    return codes.to(integer).view(floating).float()


def lookup(codes: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    # On a CPU index_select with int32 takes a third of the time of indexing or embedding.
    return values.index_select(0, codes.reshape(-1).int()).view(codes.shape)


def _divide(x: torch.Tensor, number: float) -> torch.Tensor:
    # By a tensor, because torch on CUDA divides by a Python number as it multiplies by the number's rounded reciprocal.
    return x / table((number,), x.device)


@lru_cache
def table(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _exponent(need: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The exponent of the power of two that the format's rule takes for each block; int32."""
    element, bits = fmt.element, need.view(torch.int32)
    if fmt.rule == "even":
        bits = bits + (1 << (22 - element.mantissa_bits))
    exponent = (bits >> 23) - 127 - element.max_exponent
    if fmt.rule == "ceil":
        fraction = int(math.ldexp(element.max_value, 23 - element.max_exponent)) & 0x7FFFFF
        exponent = exponent + ((bits & 0x7FFFFF) > fraction)
    return exponent


def _small_codes(wanted: torch.Tensor, fmt: Format, rows: torch.Tensor | None) -> torch.Tensor:
    return minifloat_codes(wanted if rows is None else wanted / rows, fmt.scale.float)


def _torch_codes(wanted: torch.Tensor, fmt: Format) -> torch.Tensor:
    scale = fmt.scale
    assert isinstance(scale, TorchFloatScale)
    raised = torch.where(wanted > 0, wanted.clamp(min=scale.smallest), wanted)
    limited = raised.clamp(max=largest_scale(fmt))
    if scale.bits == 32:
        return limited.view(torch.int32)
    floating, integer = _TORCH_FLOATS[scale.name]
    return limited.to(floating).view(integer).int()


@lru_cache
def largest_code(fmt: Format) -> int:
    """The largest power-of-two code under which the element's largest value is still a finite bf16."""
    return max(code for code, value in enumerate(fmt.scale.table) if value * fmt.element.max_value <= BF16_MAX)


@lru_cache
def largest_scale(fmt: Format) -> float:
    """The same for fp16, bf16 and fp32 scales, cut to the scale's precision so that rounding does not pass it."""
    digits = 24 if fmt.scale.bits == 32 else 8
    mantissa, exponent = math.frexp(BF16_MAX / fmt.element.max_value)
    return min(fmt.scale.max_value, math.ldexp(math.floor(math.ldexp(mantissa, digits)), exponent - digits))
