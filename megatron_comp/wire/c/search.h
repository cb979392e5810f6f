/* The scale of least squared error out of a short list. */

#pragma once

#include "dequantize.h"
#include "quantize.h"
#include "scale.h"

/* Squared errors of the scales taken, relative to the power of two at or below each block's maximum. */
static void take_errors(const Codec *c, Tile *t)
{
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
    fold_sum(t->y, c, t, t->error);
}

/* Of all candidates the one of least squared error, the first of equals. */
static void search_scales(const Codec *c, Tile *t)
{
    fold_peak(t->x, c, t, t->power);
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
