# SPDX-License-Identifier: Apache-2.0
"""The scale stage: from what a block needs to a scale code, and from the code to its value.

Legend: N blocks of a tile. `need` fp32 [N]: the magnitude that the scale must bring to the element's largest value.
`row`: the fp32 scale of the tile's row, 1.0 for formats that have none.
"""

import triton
import triton.language as tl

from .numbers import EXPONENT, INTERPRETED, bf16_bits, small_float_codes, small_float_values, to_bits, to_float


@triton.jit
def row_scale(largest_need, F: tl.constexpr):
    """The scale of a row from the largest need of its blocks, those with NaN left out."""
    return tl.maximum(tl.div_rn(largest_need, F.row_scale_divisor), F.smallest_row_scale)


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
        return tl.fma(tl.fma(-quotient, DIVISOR, x), RECIPROCAL, quotient)


@triton.jit
def reciprocal(scales, F: tl.constexpr):
    """1 / scales to the last bit."""
    if F.scale_kind == "fp16" and not INTERPRETED:
        # One step of Newton's method is enough: a reciprocal of 11 bits is never close to the middle of two floats.
        near = 1.0 / scales
        return tl.fma(tl.fma(-scales, near, 1.0), near, near)
    else:
        return tl.div_rn(tl.full(scales.shape, 1.0, tl.float32), scales)


@triton.jit
def scale_codes(need, bad, row, F: tl.constexpr, WHICH: tl.constexpr):
    """(int32 codes, fp32 reciprocals to multiply values by), [N], of the format's candidate number WHICH.

    The reciprocal is 0 where all becomes 0, and any number if the block is bad.
    With mxfp4, a need of 5.0 is 2^2 * 1.25 under the element's 2^2 * 1.5: scale 2^0, code 127, reciprocal 1.0.
    """
    CANDIDATE: tl.constexpr = F.candidates[WHICH]
    if F.scale_kind == "power":
        exponent = _exponent(need, F) + CANDIDATE
        codes = tl.minimum(tl.maximum(exponent + F.scale_bias, 0), F.largest_scale_code)
    else:
        wanted = need
        if CANDIDATE != 1.0:
            wanted = need * CANDIDATE
        wanted = divide(wanted, F.max_value)
        if F.scale_kind == "small":
            if F.row_scaled:
                wanted = tl.div_rn(wanted, tl.broadcast_to(row, wanted.shape))
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
        scales = scale_values(codes, row, F)
        reciprocals = tl.where(scales == 0.0, 0.0, reciprocal(scales, F))
    return codes, reciprocals


@triton.jit
def scale_values(codes, row, F: tl.constexpr):
    """fp32 scales [N] of the codes."""
    if F.scale_kind == "power":
        # Below fp32's normal numbers there is one more power to reach: 2^-127, which has bit 22 alone.
        bits = tl.maximum((codes + (127 - F.scale_bias)) << 23, 1 << 22)
        values = to_float(tl.where(codes == F.scale_nan_code, 0x7FC00000, bits))
    elif F.scale_kind == "small":
        FLOAT: tl.constexpr = F.scale_float
        values = small_float_values(codes, FLOAT)
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
        exponent += ((bits & 0x7FFFFF) > F.above_max).to(tl.int32)
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
