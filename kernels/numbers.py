"""Numbers by their bits: rounding, elements and small floats, alike on every GPU and in Triton's interpreter.

Only integer operations and single fp32 additions, multiplications and IEEE divisions, none of which a GPU approximates;
exponents come from bits. No conversion instructions for elements: those for fp8 exist from sm_89 on, those for
fp4 from sm_100 on, and Triton's interpreter rounds fp8 wrongly.
"""

import triton
import triton.language as tl
from triton import knobs

# The interpreter truncates fp32 to bf16 where hardware rounds to nearest even.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))

SIGN = tl.constexpr(-(1 << 31))
EXPONENT = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
SMALLEST_NORMAL = tl.constexpr(2.0**-126)
BF16_MAX = tl.constexpr((2 - 2**-7) * 2.0**127)
FP16_MAX = tl.constexpr(65504.0)
# Adding 1.5 * 2^23 to a small number leaves its nearest integer, ties to even, in the low bits.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def to_bits(x):
    """fp32 to the int32 with the same bits."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def to_float(bits):
    """int32 to the fp32 with the same bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def bf16_bits(x):
    """fp32, finite, to the bits of the nearest bf16, ties to even; int32 0 .. 65535. 1.00390625 (a tie) -> 0x3f80."""
    bits = to_bits(x)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


@triton.jit
def store_rounded(ptr, x, mask):
    """Stores fp32 `x` in the type that `ptr` points to, rounded to nearest even; NaN stays NaN."""
    if ptr.dtype.element_ty == tl.bfloat16 and INTERPRETED:
        bits = tl.where(x == x, bf16_bits(x), 0x7FC0)
        tl.store(ptr, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def small_float_codes(magnitude, FLOAT: tl.constexpr):
    """fp32 >= 0 to the nearest codes, ties to even, saturating; bits above a code's own are left over.

    With e2m1, 2.5 (a tie of 2 and 3) -> 4, which is 2. Adding 2^(23 - mantissa_bits) times the value's own power of two
    rounds it to the format's grid and leaves the steps in the sum's low bits; below the smallest normal that power
    stays the smallest normal's. NaN gives no useful code.
    """
    DROP: tl.constexpr = 23 - FLOAT.mantissa_bits
    FIRST_NORMAL: tl.constexpr = (128 - FLOAT.bias) << 23
    magnitude = tl.minimum(magnitude, FLOAT.max_value)
    power = tl.maximum(to_bits(magnitude) & EXPONENT, FIRST_NORMAL)
    # The product is exact, so fused or not is the same; on a GPU this is one instruction.
    steps = to_bits(tl.fma(to_float(power), 2.0**DROP, magnitude))
    return steps + ((power >> DROP) - (FIRST_NORMAL >> DROP))


@triton.jit
def small_float_values(codes, FLOAT: tl.constexpr):
    """Codes to fp32; e2m1: 5 -> 3.0, and 1, a subnormal, -> 0.5. The codes may have a sign in fp32's place.

    A code's exponent and mantissa in fp32's places stand for the value at fp32's bias, subnormals included.
    """
    return to_float(codes << (23 - FLOAT.mantissa_bits)) * (2.0 ** (127 - FLOAT.bias))


@triton.jit
def element_codes(y, F: tl.constexpr):
    """Scaled fp32 values to element codes, int32; NaN gives some code."""
    if F.element is None:
        limited = tl.minimum(tl.maximum(y, F.lowest), F.max_value)
        return to_bits(limited + ROUNDER) & F.mask
    else:
        ELEMENT: tl.constexpr = F.element
        codes = small_float_codes(tl.abs(y), ELEMENT)
        return (codes & (F.half - 1)) | ((to_bits(y) >> (32 - F.bits)) & F.half)


@triton.jit
def element_values(codes, F: tl.constexpr):
    """Element codes, int32 0 .. 2^bits - 1, to fp32."""
    if F.element is None:
        # codes ^ half counts from the lowest value; in the mantissa of 2^23 it is exact.
        return to_float((codes ^ F.half) | 0x4B000000) - (8388608.0 + F.half)
    else:
        # The sign goes to fp32's place: shift the code to the top, back with the sign spread, and drop the spread.
        ELEMENT: tl.constexpr = F.element
        SHIFT: tl.constexpr = 32 - F.bits
        KEPT: tl.constexpr = SIGN | ((F.half - 1) << (23 - F.mantissa_bits))
        bits = ((codes << SHIFT) >> (SHIFT - 23 + F.mantissa_bits)) & KEPT
        return to_float(bits) * (2.0 ** (127 - ELEMENT.bias))
