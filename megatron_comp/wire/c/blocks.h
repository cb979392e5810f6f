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

INLINE void butterflies(float *x, int n, const int distance)
{
    for (int at = 0; at < n; at += 2 * distance)
        for (int i = at; i < at + distance; i++) {
            const float a = x[i], b = x[i + distance];
            x[i] = a + b;
            x[i + distance] = a - b;
        }
}

/* Orthonormal Walsh-Hadamard transform of the whole blocks among the values; a short last block stays as it is. */
static void hadamard(const Codec *c, const Tile *t, float *x)
{
    const int n = t->values / c->block * c->block;
    butterflies(x, n, 1);
    butterflies(x, n, 2);
    butterflies(x, n, 4);
    if (c->block > 8)
        butterflies(x, n, 8);
    if (c->block > 16)
        butterflies(x, n, 16);
    for (int distance = 32; distance < c->block; distance *= 2)
        butterflies(x, n, distance);
    for (int i = 0; i < n; i++)
        x[i] *= c->hadamard_factor;
}
