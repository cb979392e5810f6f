/* SPDX-License-Identifier: Apache-2.0 */
/* Values to the codes of elements. */

#pragma once

#include "blocks.h"

/* How many thresholds a magnitude is above, below its sign. */
INLINE void quantize_to_levels(const Codec *c, const Tile *t, int n, const int thresholds)
{
    const uint32_t up = 32 - c->bits, sign = 1u << (c->bits - 1);
    const float *restrict x = t->x, *restrict reciprocal = t->spread;
    uint8_t *restrict codes = t->codes;
    float threshold[15];
    memcpy(threshold, c->threshold, sizeof(threshold));
    for (int i = 0; i < n; i++) {
        const uint32_t scaled = bits_of(x[i] * reciprocal[i]);
        const float magnitude = float_of(scaled & MAGNITUDE_BITS);
        uint32_t code = scaled >> up & sign;
        for (int k = 0; k < thresholds; k++)
            code += magnitude > threshold[k];
        codes[i] = code;
    }
}

/* `x` times the reciprocals to codes: nearest, ties to even, saturating. Integers alone lose the sign of zero. */
static void quantize(const Codec *c, const Tile *t)
{
    const int n = t->blocks * c->block, bits = c->bits;
    const float *restrict x = t->x, *restrict reciprocal = t->spread;
    uint8_t *restrict codes = t->codes;
    spread(t->reciprocal, t->blocks, c->block, t->spread);
    if (c->element_kind == ELEMENT_INTEGER) {
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
    } else if (c->element_kind == ELEMENT_LEVELS) {
        switch (bits) {
        case 2: quantize_to_levels(c, t, n, 1); break;
        case 3: quantize_to_levels(c, t, n, 3); break;
        case 4: quantize_to_levels(c, t, n, 7); break;
        default: quantize_to_levels(c, t, n, 15);
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
