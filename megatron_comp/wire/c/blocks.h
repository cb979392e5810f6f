/* SPDX-License-Identifier: Apache-2.0 */
/* From blocks to values and back, and the transform of blocks. */

#pragma once

#include "minifloat.h"

NOINLINE void spread(const float *restrict of_block, int blocks, int copies, float *restrict out)
{
    for (int b = 0; b < blocks; b++)
        for (int i = 0; i < copies; i++)
            out[b * copies + i] = of_block[b];
}

INLINE float least(float a, float b) { return a < b ? a : b; }
INLINE float greatest(float a, float b) { return a > b ? a : b; }
INLINE float sum(float a, float b) { return a + b; }
/* Of magnitudes; NaN counts as larger than infinity. */
INLINE float peak(float a, float b)
{
    return float_of(larger(bits_of(a) & MAGNITUDE_BITS, bits_of(b) & MAGNITUDE_BITS));
}

/* One number per block of so many: neighbours are joined, then pairs of pairs, and so on; nothing is done for 1. */
#define DEFINE_FOLD(operation)                                                                                         \
    NOINLINE void operation##_of_pairs(const float *restrict in, int pairs, float *restrict out)                       \
    {                                                                                                                  \
        for (int i = 0; i < pairs; i++)                                                                                \
            out[i] = operation(in[2 * i], in[2 * i + 1]);                                                              \
    }                                                                                                                  \
    static void fold_##operation(const float *x, int block, const Tile *t, float *out)                                 \
    {                                                                                                                  \
        float *to = t->work, *other = to + t->blocks * block / 2;                                                      \
        for (int n = t->blocks * block / 2; n >= t->blocks; n /= 2) {                                                  \
            operation##_of_pairs(x, n, n == t->blocks ? out : to);                                                     \
            x = to, to = other, other = (float *)x;                                                                    \
        }                                                                                                              \
    }

DEFINE_FOLD(least)
DEFINE_FOLD(greatest)
DEFINE_FOLD(sum)
DEFINE_FOLD(peak)

/* A maximum does not depend on order, so every eighth value of a block comes first, in a register: encoding int4 takes
 * three quarters of the time that `fold_peak` alone makes it take. */
static void largest_magnitudes(const float *restrict x, int block, const Tile *t, float *out)
{
    float *restrict tops = t->spread;
    for (int b = 0; b < t->blocks; b++) {
        float top[SMALLEST_BLOCK] = {0};
        for (int i = 0; i < block; i += SMALLEST_BLOCK)
            for (int k = 0; k < SMALLEST_BLOCK; k++)
                top[k] = peak(top[k], x[b * block + i + k]);
        memcpy(tops + b * SMALLEST_BLOCK, top, sizeof(top));
    }
    fold_peak(tops, SMALLEST_BLOCK, t, out);
}

INLINE void butterflies(float *x, int n, const int distance)
{
    for (int at = 0; at < n; at += 2 * distance)
        for (int i = at; i < at + distance; i++) {
            const float a = x[i], b = x[i + distance];
            x[i] = a + b;
            x[i + distance] = a - b;
        }
}

/* Compilers make this a vector register, or two or four of them. */
typedef float Eight __attribute__((vector_size(32)));
typedef float EightInMemory __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t EightBits __attribute__((vector_size(32)));
enum { LANES = 8 };

/* Of lanes i and i ^ distance the sum and the difference, which is the sum with a negative number. */
INLINE Eight butterflies_of_lanes(Eight x, const EightBits partners, const EightBits signs)
{
#ifdef __clang__
    Eight partner;
    for (int i = 0; i < LANES; i++)
        partner[i] = x[partners[i]];
#else
    const Eight partner = __builtin_shuffle(x, partners);
#endif
    return partner + (Eight)((EightBits)x ^ signs);
}

/* All stages within so many vectors, which stay in registers, and the factor. */
INLINE void butterflies_within(float *x, int n, const int vectors, const float factor)
{
    const uint32_t S = SIGN_BIT;
    for (int at = 0; at < n; at += LANES * vectors) {
        Eight v[8];
        for (int k = 0; k < vectors; k++) {
            v[k] = *(const EightInMemory *)(x + at + LANES * k);
            v[k] = butterflies_of_lanes(v[k], (EightBits){1, 0, 3, 2, 5, 4, 7, 6}, (EightBits){0, S, 0, S, 0, S, 0, S});
            v[k] = butterflies_of_lanes(v[k], (EightBits){2, 3, 0, 1, 6, 7, 4, 5}, (EightBits){0, 0, S, S, 0, 0, S, S});
            v[k] = butterflies_of_lanes(v[k], (EightBits){4, 5, 6, 7, 0, 1, 2, 3}, (EightBits){0, 0, 0, 0, S, S, S, S});
        }
        for (int distance = 1; distance < vectors; distance *= 2)
            for (int k = 0; k < vectors; k++)
                if (!(k & distance)) {
                    const Eight a = v[k], b = v[k + distance];
                    v[k] = a + b;
                    v[k + distance] = a - b;
                }
        for (int k = 0; k < vectors; k++)
            *(EightInMemory *)(x + at + LANES * k) = v[k] * factor;
    }
}

/* Orthonormal Walsh-Hadamard transform of the whole blocks among the values; a short last block stays as it is. */
static void hadamard(const Codec *c, const Tile *t, float *x)
{
    const int n = t->values / c->block * c->block;
    const float factor = c->hadamard_factor;
    switch (c->block) {
    case 8: butterflies_within(x, n, 1, factor); return;
    case 16: butterflies_within(x, n, 2, factor); return;
    case 32: butterflies_within(x, n, 4, factor); return;
    case 64: butterflies_within(x, n, 8, factor); return;
    }
    butterflies_within(x, n, 8, 1);
    for (int distance = 64; distance < c->block; distance *= 2)
        butterflies(x, n, distance);
    for (int i = 0; i < n; i++)
        x[i] *= factor;
}
