/* SPDX-License-Identifier: Apache-2.0 */
/* Values to the codes of elements. */

#pragma once

#include "blocks.h"

/* `x` times the reciprocals to codes: nearest, ties to even, saturating. Minifloats keep the sign of zero. */
static void quantize(const Codec *c, const Tile *t)
{
    const int n = t->blocks * c->block, bits = c->bits;
    const float *restrict x = t->x, *restrict reciprocal = t->spread;
    uint8_t *restrict codes = t->codes;
    spread(t->reciprocal, t->blocks, c->block, t->spread);
    if (c->integer) {
        /* Adding 1.5 * 2^23 rounds to an integer in the low bits; out of range, the sum's bits are out of range too. */
        const float magic = 12582912.0f;
        const int32_t lowest = bits_of(magic + c->lowest), highest = bits_of(magic + c->highest);
        const uint32_t mask = (1u << bits) - 1;
        for (int i = 0; i < n; i++) {
            int32_t code = bits_of(x[i] * reciprocal[i] + magic);
            code = code < lowest ? lowest : code;
            code = code > highest ? highest : code;
            codes[i] = code & mask;
        }
    } else {
        const Minifloat element = c->element;
        const uint32_t sign = 1u << (bits - 1);
        for (int i = 0; i < n; i++) {
            const uint32_t scaled = bits_of(x[i] * reciprocal[i]);
            const uint32_t code = minifloat_code(scaled & MAGNITUDE_BITS, element);
            codes[i] = code | (scaled >> (32 - bits) & sign);
        }
    }
}
