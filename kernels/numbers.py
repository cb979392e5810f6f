# SPDX-License-Identifier: Apache-2.0
"""Numbers by their bits: rounding, elements and small floats, alike on every GPU and in Triton's interpreter.

Only integer operations and single fp32 additions, multiplications and IEEE divisions, none of which a GPU approximates;
exponents come from bits. The one approximation, `near_reciprocal`, is corrected where it is used. No conversion
instructions for elements: those for fp8 exist from sm_89 on, those for fp4 from sm_100 on, and Triton's interpreter
rounds fp8 wrongly. An instruction that only NVIDIA's GPUs have stands beside the plain way, which others and the
interpreter take.
"""

import math

import triton
import triton.language as tl
from triton import constexpr_function, knobs
from triton.language.target_info import is_cuda

# The interpreter truncates fp32 to bf16 where hardware rounds to nearest even.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))

SIGN = tl.constexpr(-(1 << 31))
EXPONENT = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
MANTISSA = tl.constexpr(0x7FFFFF)
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


@constexpr_function
def for_nvidia():
    """Whether this is compiled for an NVIDIA GPU, so that PTX may be used."""
    return not knobs.runtime.interpret and is_cuda()


@triton.jit
def flush_subnormals(x):
    """fp32; subnormals become zeros of their sign."""
    if for_nvidia():  # which has that in one instruction, where a comparison and a choice would go to the integer pipe
        ONE: tl.constexpr = "mul.ftz.f32 $0, $1, 0f3F800000;"
        return tl.inline_asm_elementwise(ONE, "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.where(tl.abs(x) < SMALLEST_NORMAL, x * 0.0, x)


@triton.jit
def widened(x):
    """To fp32, as it is."""
    DTYPE: tl.constexpr = x.dtype
    if DTYPE.is_bf16():  # by its bits, because the compiler takes two instructions for every second value otherwise
        return to_float(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        return x.to(tl.float32)


@triton.jit
def flushed_product(x, y):
    """fp32 x * y, where subnormal x count as zeros of their sign. y and products that matter are not subnormal."""
    if for_nvidia():
        PRODUCT: tl.constexpr = "mul.ftz.f32 $0, $1, $2;"
        x, y = tl.broadcast(x, y)
        return tl.inline_asm_elementwise(PRODUCT, "=f,f,f", [x, y], tl.float32, is_pure=True, pack=1)
    else:
        return flush_subnormals(x) * y


@triton.jit
def near_reciprocal(x):
    """1 / fp32 x, off by a unit or two in the last place. Neither of them is subnormal."""
    if for_nvidia():
        NEAR: tl.constexpr = "rcp.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(NEAR, "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def largest_bits(x_NB):
    """[N]: the bits of each block's largest magnitude, which are those of a NaN or an infinity if it has any."""
    if for_nvidia():
        # In PTX, because the compiler would take the sign off bits, where the maximum has that for nothing.
        ABS: tl.constexpr = "abs.f32 $0, $1;"
        magnitude_NB = tl.inline_asm_elementwise(ABS, "=f,f", [x_NB], tl.float32, is_pure=True, pack=1)
        return to_bits(tl.reduce(magnitude_NB, 1, _larger_or_nan))
    else:
        # Without their sign, the bits of floats have the floats' order, infinity and NaN above all numbers.
        return tl.max(to_bits(x_NB) & MAGNITUDE, axis=1)


@triton.jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


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


@constexpr_function
def code_offset(fmt):
    """What `_codes` adds to a value, in powers of two of the value's own, so that zero gets code 0.

    Rounding leaves 2^23 more steps than the value has, and the power's exponent adds those of the binades below.
    """
    first_normal = (128 - fmt.bias) << fmt.mantissa_bits
    return 2.0**-fmt.mantissa_bits * ((2 << 23) - first_normal)


@triton.jit
def small_float_codes(magnitude, FLOAT: tl.constexpr):
    """fp32 >= 0 to the nearest codes, ties to even, saturating; bits 23 and up hold something else.

    With e2m1, 2.5 (a tie of 2 and 3) -> 4, which is 2. NaN gives no useful code.
    """
    return _codes(magnitude, code_offset(FLOAT), FLOAT)


@triton.jit
def _codes(magnitude, offset, FLOAT: tl.constexpr):
    """Codes of fp32 >= 0, larger by what `offset` is above `code_offset`, in steps of 2^-mantissa_bits.

    Adding about 2^(24 - mantissa_bits) times the value's own power of two rounds it to the format's grid and leaves the
    steps in the sum's mantissa; below the smallest normal that power stays the smallest normal's.
    """
    DROP: tl.constexpr = 23 - FLOAT.mantissa_bits
    magnitude = tl.minimum(magnitude, FLOAT.max_value)
    power = tl.maximum(to_bits(magnitude) & EXPONENT, (128 - FLOAT.bias) << 23)
    # The product is exact, so fused or not is the same; on a GPU this is one instruction.
    return to_bits(tl.fma(to_float(power), offset, magnitude)) + (power >> DROP)


@triton.jit
def small_float_values(codes, FLOAT: tl.constexpr):
    """Codes to fp32; e2m1: 5 -> 3.0, and 1, a subnormal, -> 0.5. The codes may have a sign in fp32's place.

    A code's exponent and mantissa in fp32's places stand for the value at fp32's bias, subnormals included.
    """
    return to_float(codes << (23 - FLOAT.mantissa_bits)) * (2.0 ** (127 - FLOAT.bias))


@triton.jit
def element_codes(y, F: tl.constexpr):
    """Scaled fp32 values to raw codes, int32, which `clean_codes` or `planes.store_field` make element codes of.

    Their bits 22 and up hold something else, and the bits of the payload's `flip` are inverted: both cost less to put
    right in several codes at once. NaN gives some code.
    """
    if F.levels is not None:
        LEVELS: tl.constexpr = F.levels
        magnitude = tl.abs(y)
        codes = (to_bits(y) >> (32 - F.bits)) & F.half
        for k in tl.static_range(len(LEVELS.thresholds)):
            codes += (magnitude > LEVELS.thresholds[k]).to(tl.int32)
        return codes
    elif F.element is None:
        # Counted from the lowest code's value, so that nothing is negative: the codes' highest bit is inverted.
        limited = tl.minimum(tl.maximum(y, F.lowest), F.max_value)
        return to_bits(limited + (ROUNDER + F.half))
    else:
        # The sign's bit as so many steps more: half of it always, and half of it with the value's sign.
        ELEMENT: tl.constexpr = F.element
        EXPONENT_OF_HALF: tl.constexpr = F.bits - 2 - F.mantissa_bits
        HALF: tl.constexpr = 2.0**EXPONENT_OF_HALF
        sign = to_float((to_bits(y) & SIGN) | ((127 + EXPONENT_OF_HALF) << 23))
        return _codes(tl.abs(y), (code_offset(ELEMENT) + HALF) - sign, ELEMENT)


@triton.jit
def element_code_pairs(y_NB, bad, F: tl.constexpr, SHORT: tl.constexpr):
    """Scaled fp32 values [N, B] to codes of minifloats [N * B / 2], two in each: from bits 0 and 16 up. NVIDIA only.

    bad [N]: these blocks get zeros. SHORT: the values were bf16 or fp16 before they were scaled.
    """
    LARGEST: tl.constexpr = largest_pair(F, SHORT)
    SIGNS: tl.constexpr = F.half * 0x10001
    low, high = _pairs(y_NB)
    limit, _ = _pairs(tl.broadcast_to(tl.where(bad, 0, LARGEST)[:, None], y_NB.shape))
    signs, _ = _pairs(tl.broadcast_to(tl.where(bad, 0, SIGNS)[:, None], y_NB.shape))
    PAIR: tl.constexpr = rounded_pair(F) if SHORT and F.rounds_in_fp16 else pair_of_codes(F)
    return tl.inline_asm_elementwise(PAIR, "=r,f,f,r,r", [low, high, limit, signs], tl.int32, is_pure=True, pack=1)


@triton.jit
def _pairs(x_NB):
    """Every first and every second one of [N, B] values, both [N * B / 2]."""
    return tl.split(x_NB.reshape(x_NB.shape[0] * x_NB.shape[1] // 2, 2))


@constexpr_function
def largest_pair(fmt, short):
    """Two of the element's largest value, in the halves of a register: as fp16 to `rounded_pair`, else as codes."""
    if short and fmt.rounds_in_fp16:
        return _two_halves(fmt.max_value)
    return _bits_of(fmt.max_value, fmt.mantissa_bits, fmt.element.bias) * 0x10001


@constexpr_function
def pair_of_codes(fmt):
    """PTX that makes element codes of two fp32 numbers."""
    return f"""{{
        .reg .b32 power, low, high, signs;
        {_code_in_ptx(fmt, "low", "$1")}
        {_code_in_ptx(fmt, "high", "$2")}
        prmt.b32 low, low, high, 0x5410;
        min.f16x2 low, low, $3;
        prmt.b32 signs, $1, $2, 0xFFBB;
        and.b32 signs, signs, $4;
        or.b32 $0, low, signs;
    }}"""


@constexpr_function
def _code_in_ptx(fmt, code, y):
    """PTX that writes the code of |y| into the register `code`; bits 16 and up hold something else.

    As in `_codes`, what is added has the value's own power of two, many binades up. In its low bits it has the number
    that makes a code of the steps and of its own exponent. What is above the element's largest value gets a code above
    the largest one, which is limited for two codes at once: as fp16, their bits have the order of integers.
    """
    mantissa, bias = fmt.mantissa_bits, fmt.element.bias
    lift = ((23 - mantissa) << 23) + (-((23 - mantissa + 128 - bias) << mantissa) & 0xFFFF)
    magnitude, limit = y, ""
    if fmt.may_overflow:  # so far up there is no float
        magnitude, limit = code, f"min.f32 {code}, {code}, 0f{_bits_of(fmt.max_value, 23, 127):08X};"
    return f"""abs.f32 {code}, {y};
        {limit}
        and.b32 power, {magnitude}, 0x7F800000;
        add.s32 power, power, {lift:#x};
        max.s32 power, power, {((128 - bias) << 23) + lift:#x};
        add.rn.f32 {code}, {code}, power;
        shr.u32 power, power, {23 - mantissa};
        add.u32 {code}, {code}, power;"""


@constexpr_function
def rounded_pair(fmt):
    """PTX that makes element codes of two fp32 numbers, which are rounded as fp16.

    Exact but for what rounds to zero anyway.
    """
    mantissa, bias, sign = fmt.mantissa_bits, fmt.element.bias, 1 << fmt.bits - 1
    smallest_normal = 2.0 ** (1 - bias)
    # Rounding leaves the steps in the sum's mantissa; fp16's exponent of the smallest normal is 16 - bias.
    offset = 2.0 ** (10 - mantissa) + (-((16 - bias) << mantissa) & (sign - 1)) * 2.0**-mantissa
    return f"""{{
        .reg .b32 value, power, code, smallest, offset;
        mov.b32 smallest, {_two_halves(smallest_normal):#x};
        mov.b32 offset, {_two_halves(offset):#x};
        cvt.rn.f16x2.f32 value, $2, $1;
        and.b32 code, value, 0x7FFF7FFF;
        min.f16x2 code, code, $3;
        and.b32 power, code, 0x7C007C00;
        max.f16x2 power, power, smallest;
        fma.rn.f16x2 code, power, offset, code;
        shr.u32 power, power, {10 - mantissa};
        add.u32 code, code, power;
        and.b32 code, code, {(sign - 1) * 0x10001:#x};
        shr.u32 value, value, {16 - fmt.bits};
        and.b32 value, value, $4;
        or.b32 $0, code, value;
    }}"""


@constexpr_function
def _two_halves(x):
    """The bits of two fp16 numbers x, normal and positive."""
    return _bits_of(x, 10, 15) * 0x10001


@constexpr_function
def _bits_of(x, mantissa_bits, bias):
    """A normal and positive number in a binary format."""
    fraction, exponent = math.frexp(x)
    return int((exponent - 2 + bias + 2 * fraction) * 2**mantissa_bits)


@triton.jit
def clean_codes(codes, F: tl.constexpr):
    """The element codes, int32 0 .. 2^bits - 1, of raw ones."""
    FLIP: tl.constexpr = F.payload.flip
    return (codes ^ FLIP) & F.mask


@constexpr_function
def bits_of_power(x):
    """The bits of fp32 x, a power of two."""
    return _bits_of(x, 23, 127)


@triton.jit
def _word_of(codes, LEVELS: tl.constexpr):
    """The word of four levels that each magnitude code's is in."""
    word = tl.full(codes.shape, LEVELS.words[0], tl.int32)
    for k in tl.static_range(1, len(LEVELS.words)):
        word = tl.where(codes >= 4 * k, LEVELS.words[k], word)
    return word


@triton.jit
def element_values(codes, F: tl.constexpr):
    """Element codes, int32 0 .. 2^bits - 1, to fp32."""
    if F.levels is not None:
        LEVELS: tl.constexpr = F.levels
        # A byte of a constant, in the mantissa of the float whose last bit is worth a unit.
        FLOAT: tl.constexpr = LEVELS.unit * 2.0**23
        FLOAT_BITS: tl.constexpr = bits_of_power(FLOAT)
        magnitude = codes & (F.half - 1)
        level = (_word_of(magnitude, LEVELS) >> ((magnitude & 3) << 3)) & 0xFF
        value = to_float(level | FLOAT_BITS) - FLOAT
        return to_float(to_bits(value) | ((codes << (32 - F.bits)) & SIGN))
    elif F.element is None:
        # codes ^ half counts from the lowest value; in the mantissa of 2^23 it is exact.
        return to_float((codes ^ F.half) | 0x4B000000) - (8388608.0 + F.half)
    else:
        # The sign goes to fp32's place: shift the code to the top, back with the sign spread, and drop the spread.
        ELEMENT: tl.constexpr = F.element
        SHIFT: tl.constexpr = 32 - F.bits
        KEPT: tl.constexpr = SIGN | ((F.half - 1) << (23 - F.mantissa_bits))
        bits = ((codes << SHIFT) >> (SHIFT - 23 + F.mantissa_bits)) & KEPT
        return to_float(bits) * (2.0 ** (127 - ELEMENT.bias))
