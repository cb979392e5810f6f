/* SPDX-License-Identifier: Apache-2.0 */
/* Numbers by their bits: minifloats, of which IEEE half precision is one, and bf16. */

#pragma once

#include "codec.h"

INLINE uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
INLINE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

static const Minifloat HALF = {10, (127 - 14) << 23, 0x7BFF, INFINITY_BITS, 65504.0f};

/* scales.minifloat_codes: nearest magnitude code of a magnitude's bits, ties to even, saturating.
 *
 * Adding 2^(23 - mantissa_bits) times the value's own power of two rounds it to the format's grid. Only the low 16 bits
 * of the result are the code's: the power of two that was added is still in the others. */
INLINE uint32_t minifloat_code(uint32_t magnitude, Minifloat f)
{
    const uint32_t drop = 23 - f.mantissa_bits;
    magnitude = smaller(magnitude, bits_of(f.max_value));
    const uint32_t power = larger(magnitude & INFINITY_BITS, f.smallest_normal);
    const uint32_t steps = bits_of(float_of(magnitude) + float_of(power + (drop << 23)));
    return steps + (power >> drop) - (f.smallest_normal >> drop);
}

/* Bits of the fp32 that a magnitude code stands for.
 *
 * Under the exponent field 0, n = 2^-bias * 1.mantissa must become 2n - 2^(1 - bias), which is exact and below n; for
 * other fields it is not below n. */
INLINE uint32_t minifloat_value(uint32_t code, Minifloat f)
{
    const float normal = float_of((code << (23 - f.mantissa_bits)) + f.smallest_normal - (1 << 23));
    const float subnormal = normal + (normal - float_of(f.smallest_normal));
    return smaller(bits_of(normal), bits_of(subnormal));
}

/* The same for codes that may be no numbers. */
INLINE uint32_t any_minifloat_value(uint32_t code, Minifloat f)
{
    const uint32_t special = code > f.max_code + 1 ? NAN_BITS : f.after_max;
    const uint32_t value = minifloat_value(code, f);
    return code > f.max_code ? special : value;
}

INLINE uint32_t half_value(uint32_t code)
{
    return (code & 0x8000) << 16 | any_minifloat_value(code & 0x7FFF, HALF);
}

INLINE uint32_t half_code(uint32_t bits)
{
    const uint32_t magnitude = bits & MAGNITUDE_BITS;
    uint32_t code = minifloat_code(magnitude, HALF) & 0x7FFF;
    code = magnitude >= 0x477FF000 ? 0x7C00 : code; /* from 65520 on, infinity is nearer */
    code = magnitude > INFINITY_BITS ? 0x7E00 : code;
    return (bits >> 16 & 0x8000) | code;
}

INLINE uint32_t bf16_code(uint32_t bits)
{
    const uint32_t rounded = bits + 0x7FFF + (bits >> 16 & 1);
    return ((bits & MAGNITUDE_BITS) > INFINITY_BITS ? NAN_BITS : rounded) >> 16;
}
