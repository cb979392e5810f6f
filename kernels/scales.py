# SPDX-License-Identifier: Apache-2.0
"""The scale stage: from what a block needs to a scale code, and from the code to its value.

Legend: N blocks of a tile. `need` fp32 [N]: the magnitude that the scale must bring to the element's largest value.
`row`: the fp32 scale of the tile's row, 1.0 for formats that have none.
"""

import triton
import triton.language as tl

from .numbers import (
    EXPONENT,
    INTERPRETED,
    MANTISSA,
    bf16_bits,
    near_reciprocal,
    small_float_codes,
    small_float_values,
    to_bits,
    to_float,
)


@triton.jit
def row_scale(largest_need, F: tl.constexpr):
    """The scale of a row from the largest need of its blocks, those with NaN left out."""
    return tl.maximum(divide(largest_need, F.row_scale_divisor), F.smallest_row_scale)


@triton.jit
def divide(x, DIVISOR: tl.constexpr):
    """x / DIVISOR to the last bit; below 2^-127, where no scale can tell, it may be off by fp32's smallest number.

    By an integer in three instructions: the product with the rounded reciprocal is off by one unit in the last place at
    most, what remains is a float, and one correction rounds rightly (P. Markstein, IBM J. Res. Dev. 34, 1990).
    """
    if INTERPRETED or DIVISOR % 1 != 0:  # the interpreter does not fuse
        return tl.div_rn(x, tl.full(x.shape, DIVISOR, tl.float32))
    else:
        RECIPROCAL: tl.constexpr = 1.0 / DIVISOR
        quotient = x * RECIPROCAL
        return tl.fma(tl.fma(quotient, -DIVISOR, x), RECIPROCAL, quotient)


@triton.jit
def reciprocal(scales, F: tl.constexpr):
    """1 / scales to the last bit; for 0 some number or NaN.

    By Newton's method where neither a scale nor its reciprocal can be subnormal: one step is enough for the 11 bits of
    fp16, whose reciprocals are never close to the middle of two floats. After a second one all are right but those just
    above half a power of two, where the error that remains is rounded off: they are known.
    """
    if INTERPRETED or (F.scale_kind != "fp16" and F.scale_kind != "small"):
        return tl.div_rn(tl.full(scales.shape, 1.0, tl.float32), scales)
    else:
        near, minus = near_reciprocal(scales), scales * -1.0
        near = tl.fma(tl.fma(minus, near, 1.0), near, near)
        if F.scale_kind == "small":
            near = tl.fma(tl.fma(minus, near, 1.0), near, near)
            bits = to_bits(scales)
            near = tl.where((bits & MANTISSA) == MANTISSA, to_float((254 << 23) - bits), near)
        return near


@triton.jit
def divide_by_row(x, row, F: tl.constexpr):
    """x [N] / row to the last bit, if it is 2^-10 or more; smaller quotients, which may be off, have code 0.

    By the reciprocal as in `divide`, with one more correction: an arbitrary row's reciprocal is off by more. Small rows
    are raised first, so that what remains of a division is not subnormal.
    """
    if INTERPRETED:
        return tl.div_rn(x, tl.broadcast_to(row, x.shape))
    else:
        raised = tl.where(row < 2.0**-60, 2.0**64, 1.0)
        row *= raised
        x *= raised
        inverse = reciprocal(row, F)
        quotient = x * inverse
        quotient = tl.fma(tl.fma(quotient, row * -1.0, x), inverse, quotient)
        return tl.fma(tl.fma(quotient, row * -1.0, x), inverse, quotient)


@triton.jit
def scale_codes(need, bad, row, F: tl.constexpr, WHICH: tl.constexpr):
    """(int32 codes, fp32 reciprocals to multiply values by), [N], of the format's candidate number WHICH.

    The reciprocal is 0 where all becomes 0, and any number if the block is bad.
    With mxfp4, a need of 5.0 is 2^2 * 1.25 under the element's 2^2 * 1.5: scale 2^0, code 127, reciprocal 1.0.
    """
    CANDIDATE: tl.constexpr = F.candidates[WHICH]
    if F.scale_kind == "power":
        exponent = _exponent(need, F) + CANDIDATE
        codes = tl.maximum(exponent + F.scale_bias, 0)
        if F.scales_saturate:
            codes = tl.minimum(codes, F.largest_scale_code)
    else:
        wanted = need
        if CANDIDATE != 1.0:
            wanted = need * CANDIDATE
        wanted = divide(wanted, F.max_value)
        if F.scale_kind == "small":
            if F.row_scaled:
                wanted = divide_by_row(wanted, row, F)
            FLOAT: tl.constexpr = F.scale_float
            codes = small_float_codes(wanted, FLOAT) & 0xFF
        else:
            codes = _float_codes(wanted, F)
    codes = tl.where(bad, F.scale_nan_code, codes)
    if F.scale_kind == "power":
        # 2^-e has the exponent field 254 - (e's), exactly; a division takes twenty instructions.
        bits = (127 + F.scale_bias - codes) << 23
        if F.largest_scale_code > 126 + F.scale_bias:
            bits = tl.maximum(bits, 1 << 22)
        reciprocals = to_float(bits)
        if F.scale_underflow_to_zero:
            reciprocals = tl.where(exponent + F.scale_bias >= 0, reciprocals, 0.0)
    else:
        scales = scale_values(codes, row, F, FINITE=True)
        reciprocals = tl.where(scales == 0.0, 0.0, reciprocal(scales, F))
    return codes, reciprocals


@triton.jit
def scale_values(codes, row, F: tl.constexpr, FINITE: tl.constexpr = False):
    """fp32 scales [N] of the codes. FINITE: those of the code for NaN are not needed."""
    if F.scale_kind == "power":
        # Below fp32's normal numbers there is one more power to reach: 2^-127, which has bit 22 alone.
        bits = tl.maximum((codes + (127 - F.scale_bias)) << 23, 1 << 22)
        values = to_float(tl.where(codes == F.scale_nan_code, 0x7FC00000, bits))
    elif F.scale_kind == "small":
        FLOAT: tl.constexpr = F.scale_float
        values = small_float_values(codes, FLOAT)
        if not FINITE:
            values = tl.where(codes >= F.scale_nan_code, float("nan"), values)
        if F.row_scaled:
            values = values * row
    elif F.scale_kind == "fp16":
        values = codes.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif F.scale_kind == "bf16":
        values = to_float(codes << 16)
    else:
        values = to_float(codes)
    return values


@triton.jit
def _exponent(need, F: tl.constexpr):
    """The exponent of the power of two that the format's rule takes for each block."""
    bits = to_bits(need)
    if F.rule == "even":
        bits += 1 << (22 - F.mantissa_bits)
    exponent = (bits >> 23) - (127 + F.max_exponent)
    if F.rule == "ceil":
        exponent += ((bits & MANTISSA) > F.above_max).to(tl.int32)
    return exponent


@triton.jit
def _float_codes(wanted, F: tl.constexpr):
    """Bits of the nearest fp16, bf16 or fp32 scale."""
    raised = tl.where(wanted > 0.0, tl.maximum(wanted, F.smallest_scale), wanted)
    limited = tl.minimum(raised, F.largest_scale)
    if F.scale_kind == "fp16":
        return limited.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    elif F.scale_kind == "bf16":
        return bf16_bits(limited)
    else:
        return to_bits(limited)


@triton.jit
def reciprocal_of_power_below(peak):
    """1 / (the power of two at or below each block's maximum), within fp32's normal numbers."""
    return to_float(tl.minimum(tl.maximum((254 << 23) - (to_bits(peak) & EXPONENT), 1 << 23), 253 << 23))
