/* SPDX-License-Identifier: Apache-2.0 */
/* The scale of least squared error out of a short list. */

#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "dequantize.h"
#include "quantize.h"
#include "scale.h"

#ifdef __AVX2__
INLINE __m256 integer_errors(const Codec *c, const float *x, float reciprocal, float scale, float power)
{
    const float magic = 12582912.0f;
    const __m256 value = _mm256_loadu_ps(x), shift = _mm256_set1_ps(magic);
    __m256i code = _mm256_castps_si256(_mm256_add_ps(_mm256_mul_ps(value, _mm256_set1_ps(reciprocal)), shift));
    code = _mm256_max_epi32(code, _mm256_set1_epi32(bits_of(magic + c->lowest)));
    code = _mm256_min_epi32(code, _mm256_set1_epi32(bits_of(magic + c->highest)));
    const __m256 decoded = _mm256_mul_ps(_mm256_sub_ps(_mm256_castsi256_ps(code), shift), _mm256_set1_ps(scale));
    const __m256 error = _mm256_mul_ps(_mm256_sub_ps(value, decoded), _mm256_set1_ps(power));
    return _mm256_mul_ps(error, error);
}

/* What `quantize`, `dequantize` and the first three steps of `fold_sum` do to integers, in registers: sums of eight
 * neighbours' squared errors, four of them a step. Works on whole steps, for which the arrays have room. */
static void take_integer_errors(const Codec *c, const Tile *t, float *eights)
{
    const int n = t->blocks * c->block, shift = __builtin_ctz(c->block);
    for (int i = 0; i < n; i += 32) {
        __m256 part[4];
        for (int k = 0; k < 4; k++) {
            const int at = i + 8 * k, b = at >> shift;
            part[k] = integer_errors(c, t->x + at, t->reciprocal[b], t->scale[b], t->power[b]);
        }
        const __m256 fours = _mm256_hadd_ps(_mm256_hadd_ps(part[0], part[1]), _mm256_hadd_ps(part[2], part[3]));
        _mm_storeu_ps(eights + i / 8, _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1)));
    }
}
#endif

/* Squared errors of the scales taken, relative to the power of two at or below each block's maximum. */
static void take_errors(const Codec *c, Tile *t)
{
#ifdef __AVX2__
    if (c->element_kind == ELEMENT_INTEGER) {
        float *eights = c->block == 8 ? t->error : t->y;
        take_integer_errors(c, t, eights);
        fold_sum(eights, c->block / 8, t, t->error);
        return;
    }
#endif
    const int n = t->blocks * c->block;
    quantize(c, t);
    dequantize(c, t, 1, t->y);
    spread(t->power, t->blocks, c->block, t->spread);
    const float *restrict x = t->x, *restrict power = t->spread;
    float *restrict y = t->y;
    for (int i = 0; i < n; i++) {
        const float error = (x[i] - y[i]) * power[i];
        y[i] = error * error;
    }
    /* What fills a row's last block up is nothing to err in. (Integers and minifloats have a zero for it.) */
    memset(y + t->values, 0, (n - t->values) * sizeof(float));
    fold_sum(t->y, c->block, t, t->error);
}

/* Of all candidates the one of least squared error, the first of equals. */
static void search_scales(const Codec *c, Tile *t)
{
    largest_magnitudes(t->x, c->block, t, t->power);
    for (int b = 0; b < t->blocks; b++) {
        const uint32_t power = (254u << 23) - (bits_of(t->power[b]) & INFINITY_BITS);
        t->power[b] = float_of(larger(1u << 23, smaller(power, 253u << 23)));
    }
    for (int k = 0; k < c->candidates; k++) {
        take_scales(c, t, c->candidate[k], t->tried_codes);
        take_errors(c, t);
        for (int b = 0; b < t->blocks; b++)
            if (k == 0 || t->error[b] < t->least_error[b]) {
                t->scale_codes[b] = t->tried_codes[b];
                t->best_reciprocal[b] = t->reciprocal[b];
                t->least_error[b] = t->error[b];
            }
    }
    memcpy(t->reciprocal, t->best_reciprocal, t->blocks * sizeof(float));
}
