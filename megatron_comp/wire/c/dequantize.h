/* SPDX-License-Identifier: Apache-2.0 */
/* Codes of elements to values, added up. */

#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "blocks.h"

/* What the smallest normal of fp32 stands for under normal codes is what the code 1 stands for in the element. */
INLINE float normal_unit(const Codec *c, const int mantissa_bits)
{
    return float_of(c->element.smallest_normal + ((126 - mantissa_bits) << 23));
}

/* A magnitude code of an element as that of a float with as many mantissa bits and no subnormals but zero.
 *
 * Exponents grow by mantissa_bits. The codes of subnormals are stretched: with two mantissa bits to 4 for each up to 1,
 * and 2 for each up to 2, so that 0 1 2 3 4 5 become 0 4 8 10 12 13. */
INLINE uint8_t normal_code(uint8_t magnitude, const int mantissa_bits)
{
    uint8_t normal = magnitude;
    for (int k = 0; k < mantissa_bits; k++) {
        const uint8_t up_to = 1 << (mantissa_bits - k), stretched = magnitude < up_to ? magnitude : up_to;
        normal += (uint8_t)(stretched << k);
    }
    return normal;
}

/* Elements without infinities and NaNs, of 7 bits at most. Bytes hold a sign and a 7-bit normal code, 64 of
 * them in a vector where fp32 has 16; moved to their place in an fp32, they lack a power of two, `unit`. */
INLINE void add_short_minifloats(
    const Codec *c, const Tile *t, int n, const int mantissa_bits, const int first, float *restrict out)
{
    const int up = 8 - c->bits, shift = 23 - mantissa_bits;
    const uint8_t sign = 1 << (c->bits - 1), *restrict codes = t->codes;
    const float *restrict scale = t->spread, unit = normal_unit(c, mantissa_bits);
    const uint32_t mask = SIGN_BIT | ((0x80 << shift) - 1);
    uint8_t *restrict normal = t->bytes;
    for (int i = 0; i < n; i++) {
        const uint8_t magnitude = codes[i] & (uint8_t)(sign - 1);
        normal[i] = normal_code(magnitude, mantissa_bits) | (uint8_t)((codes[i] & sign) << up);
    }
    for (int i = 0; i < n; i++) {
        const uint32_t extended = (int8_t)normal[i];
        out[i] = (first ? ZERO : out[i]) + float_of(extended << shift & mask) * unit * scale[i];
    }
}

/* Elements of 8 bits, by the upper halves of fp32s. */
INLINE void add_long_minifloats(
    const Codec *c, const Tile *t, int n, const int mantissa_bits, const int first, float *restrict out)
{
    const uint8_t after_max = c->element.max_code + 1, *restrict codes = t->codes;
    const uint16_t its_value = c->element.after_max >> 16;
    const float *restrict scale = t->spread, unit = normal_unit(c, mantissa_bits);
    uint16_t *restrict half = (uint16_t *)t->work;
    for (int i = 0; i < n; i++) {
        const uint8_t magnitude = codes[i] & 0x7F;
        const uint16_t normal = (uint16_t)normal_code(magnitude, mantissa_bits) << (7 - mantissa_bits);
        const uint16_t special = magnitude > after_max ? NAN_BITS >> 16 : its_value;
        const uint16_t sign = (uint16_t)(codes[i] & 0x80) << 8;
        half[i] = (magnitude < after_max ? normal : special) | sign;
    }
    for (int i = 0; i < n; i++)
        out[i] = (first ? ZERO : out[i]) + float_of((uint32_t)half[i] << 16) * unit * scale[i];
}

/* Any other element, slower: mantissas of other lengths, and short elements with codes that are not numbers. */
INLINE void add_minifloats(const Codec *c, const Tile *t, int n, const int first, float *restrict out)
{
    const Minifloat element = c->element;
    const uint32_t sign = 1u << (c->bits - 1);
    const uint8_t *restrict codes = t->codes;
    const float *restrict scale = t->spread;
    for (int i = 0; i < n; i++) {
        const uint32_t value = any_minifloat_value(codes[i] & (sign - 1), element);
        out[i] = (first ? ZERO : out[i]) + float_of((codes[i] & sign) << (32 - c->bits) | value) * scale[i];
    }
}

INLINE void add_integers(const Codec *c, const Tile *t, int n, const int first, float *restrict out)
{
    const uint8_t half = 1 << (c->bits - 1), *restrict codes = t->codes;
    const float *restrict scale = t->spread;
    for (int i = 0; i < n; i++)
        out[i] = (first ? ZERO : out[i]) + (float)(int8_t)((codes[i] ^ half) - half) * scale[i];
}

INLINE void add_levels(const Codec *c, const Tile *t, int n, const int first, float *restrict out)
{
    const uint8_t *restrict codes = t->codes;
    const float *restrict scale = t->spread, *restrict value = c->value;
    for (int i = 0; i < n; i++)
        out[i] = (first ? ZERO : out[i]) + value[codes[i]] * scale[i];
}

#ifdef __AVX512F__
/* Elements of up to 4 bits, whose 16 values fit into a register, levels of 5 bits, which take two of them, and int8, whose
 * codes are its values. Blocks of 16 and more give each register one scale. (Against the loops above, with scales spread
 * out to values, summing 4 messages takes about half the time with mxfp4, three quarters with int8.) Works on whole
 * registers, for which the arrays have room. */
INLINE void add_registers(const Codec *c, const Tile *t, int n, const int bits, const int first, float *out)
{
    const __m512 table = _mm512_loadu_ps(c->value), more = _mm512_loadu_ps(c->value + 16);
    const int shift = __builtin_ctz(c->block);
    for (int i = 0; i < n; i += 16) {
        const __m128i codes = _mm_loadu_si128((const __m128i *)(t->codes + i));
        const __m512 value = bits == 8 ? _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes))
            : bits == 5 ? _mm512_permutex2var_ps(table, _mm512_cvtepu8_epi32(codes), more)
                        : _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), table);
        const __m512 scaled = _mm512_mul_ps(value, _mm512_set1_ps(t->scale[i >> shift]));
        _mm512_storeu_ps(out + i, first ? scaled : _mm512_add_ps(_mm512_loadu_ps(out + i), scaled));
    }
}
#endif

INLINE void dequantize_to(const Codec *c, const Tile *t, int n, const int first, float *out)
{
#ifdef __AVX512F__
    if (c->block >= 16 && c->bits <= 4) {
        add_registers(c, t, n, 4, first, out);
        return;
    }
    if (c->block >= 16 && c->element_kind == ELEMENT_LEVELS) {
        add_registers(c, t, n, 5, first, out);
        return;
    }
    if (c->block >= 16 && c->element_kind == ELEMENT_INTEGER && c->bits == 8) {
        add_registers(c, t, n, 8, first, out);
        return;
    }
#endif
    spread(t->scale, t->blocks, c->block, t->spread);
    if (c->element_kind == ELEMENT_INTEGER) {
        add_integers(c, t, n, first, out);
        return;
    }
    if (c->element_kind == ELEMENT_LEVELS) {
        add_levels(c, t, n, first, out);
        return;
    }
    const int all_finite = c->element.max_code == (1u << (c->bits - 1)) - 1, mantissa_bits = c->element.mantissa_bits;
    switch (c->bits == 8 ? -mantissa_bits : all_finite ? mantissa_bits : 0) {
    case 1: add_short_minifloats(c, t, n, 1, first, out); break;
    case 2: add_short_minifloats(c, t, n, 2, first, out); break;
    case 3: add_short_minifloats(c, t, n, 3, first, out); break;
    case -2: add_long_minifloats(c, t, n, 2, first, out); break;
    case -3: add_long_minifloats(c, t, n, 3, first, out); break;
    default: add_minifloats(c, t, n, first, out);
    }
}

/* Adds the values of the codes, times the scales, to `out`, or sets `out` to the first of them. */
static void dequantize(const Codec *c, const Tile *t, int first, float *out)
{
    const int n = t->blocks * c->block;
    if (first)
        dequantize_to(c, t, n, 1, out);
    else
        dequantize_to(c, t, n, 0, out);
}
