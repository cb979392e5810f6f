/* SPDX-License-Identifier: Apache-2.0 */
/* Scales: from what blocks need to codes, and from codes to values. */

#pragma once

#include "blocks.h"

static void take_row_scale(const Codec *c, Tile *t)
{
    float largest = 0;
    for (int b = 0; b < t->blocks; b++)
        largest = greatest(largest, t->need[b]);
    t->row_scale = greatest(largest / c->row_divisor, c->smallest_row_scale);
}

INLINE uint32_t float_scale_code(const Codec *c, int kind, float need, float row_scale)
{
    const float wanted = need / c->max_value;
    if (kind == SCALE_SMALL_FLOAT)
        return minifloat_code(bits_of(wanted / row_scale), c->small_float) & 0xFF;
    const float raised = wanted > 0 ? greatest(wanted, c->smallest) : wanted;
    const uint32_t limited = bits_of(least(raised, c->largest));
    return kind == SCALE_FP16 ? half_code(limited) : kind == SCALE_BF16 ? bf16_code(limited) : limited;
}

INLINE float scale_value(const Codec *c, int kind, uint32_t code, float row_scale)
{
    uint32_t bits = code;
    if (kind == SCALE_POWER_OF_TWO) {
        const uint32_t exponent = code + 127 - c->bias;
        bits = code == c->nan_code ? NAN_BITS : exponent ? exponent << 23 : 1 << 22;
    } else if (kind == SCALE_SMALL_FLOAT) {
        return float_of(any_minifloat_value(code, c->small_float)) * row_scale;
    } else if (kind == SCALE_FP16) {
        bits = half_value(code);
    } else if (kind == SCALE_BF16) {
        bits = code << 16;
    }
    return float_of(bits);
}

/* Below 0 where the scale would be below the smallest. */
INLINE int power_of_two_code(const Codec *c, float need, int shift)
{
    const uint32_t bits = bits_of(need) + c->round_up;
    const int up = ((bits & 0x7FFFFF) > c->ceil_above) + shift;
    const int code = (int)(bits >> 23) - 127 - c->max_exponent + up + c->bias;
    return code > c->largest_code ? c->largest_code : code;
}

INLINE void take_codes_of(const Codec *codec, const Tile *t, const int kind, float candidate, uint32_t *restrict codes)
{
    const Codec c = *codec;
    const int blocks = t->blocks, shift = candidate;
    const float row_scale = t->row_scale, *restrict need = t->need;
    const uint32_t *restrict bad = t->bad;
    float *restrict alive = t->reciprocal;
    for (int b = 0; b < blocks; b++) {
        uint32_t code;
        if (kind == SCALE_POWER_OF_TWO) {
            const int wanted = power_of_two_code(&c, need[b], shift);
            code = wanted < 0 ? 0 : wanted;
            alive[b] = (wanted < 0) & c.underflow_to_zero ? 0 : 1;
        } else {
            code = float_scale_code(&c, kind, need[b] * candidate, row_scale);
            alive[b] = 1;
        }
        codes[b] = bad[b] ? c.nan_code : code;
    }
}

INLINE void read_scales_of(const Codec *codec, const Tile *t, const int kind, const uint32_t *restrict codes)
{
    const Codec c = *codec;
    const int blocks = t->blocks;
    const float row_scale = t->row_scale;
    float *restrict scale = t->scale;
    for (int b = 0; b < blocks; b++)
        scale[b] = scale_value(&c, kind, codes[b], row_scale);
}

#define OF_ITS_KIND(function, c, ...)                                                                                  \
    switch ((c)->scale_kind) {                                                                                         \
    case SCALE_POWER_OF_TWO: function(c, t, SCALE_POWER_OF_TWO, __VA_ARGS__); break;                                   \
    case SCALE_SMALL_FLOAT: function(c, t, SCALE_SMALL_FLOAT, __VA_ARGS__); break;                                     \
    case SCALE_FP16: function(c, t, SCALE_FP16, __VA_ARGS__); break;                                                   \
    case SCALE_BF16: function(c, t, SCALE_BF16, __VA_ARGS__); break;                                                   \
    case SCALE_FP32: function(c, t, SCALE_FP32, __VA_ARGS__); break;                                                   \
    }

static void read_scales(const Codec *c, const Tile *t, const uint32_t *codes)
{
    OF_ITS_KIND(read_scales_of, c, codes)
}

/* Codes, their values, and the reciprocals to multiply values by, 0 where all becomes 0. */
static void take_scales(const Codec *c, const Tile *t, float candidate, uint32_t *codes)
{
    const int blocks = t->blocks;
    const float *restrict scale = t->scale;
    float *restrict reciprocal = t->reciprocal;
    OF_ITS_KIND(take_codes_of, c, candidate, codes)
    read_scales(c, t, codes);
    for (int b = 0; b < blocks; b++)
        reciprocal[b] = scale[b] > 0 ? reciprocal[b] / scale[b] : 0;
}
