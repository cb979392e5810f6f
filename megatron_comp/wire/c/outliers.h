/* SPDX-License-Identifier: Apache-2.0 */
/* What goes before the scale: blocks that hold no numbers, spikes and zero points. */

#pragma once

#include <math.h>

#include "blocks.h"

/* Sets what is filling in the last block, and what travels as a spike. */
static void set_dead(const Codec *c, const Tile *t, float *x, float value)
{
    for (int i = t->values; i < t->blocks * c->block; i++)
        x[i] = value;
    if (c->spike)
        for (int k = 0; k < 2 * t->blocks; k++)
            x[k / 2 * c->block + t->spike_places[k]] = value;
}

/* Blocks that hold a NaN or an infinity become zeros; only their scales and spikes will tell. */
static void clear_bad_blocks(const Codec *c, const Tile *t)
{
    const int blocks = t->blocks;
    float *restrict need = t->need;
    uint32_t *restrict bad = t->bad, any = 0;
    for (int b = 0; b < blocks; b++) {
        bad[b] = bits_of(need[b]) >= INFINITY_BITS;
        need[b] = bad[b] ? 0 : need[b];
        any |= bad[b];
    }
    for (int b = 0; any && b < blocks; b++)
        if (bad[b])
            memset(t->x + b * c->block, 0, c->block * sizeof(float));
}

/* Places and bf16 values of each block's minimum and maximum, the first of equals. */
static void take_spikes(const Codec *c, Tile *t)
{
    for (int b = 0; b < t->blocks; b++) {
        const float *x = t->x + b * c->block;
        const int n = t->values - b * c->block < c->block ? t->values - b * c->block : c->block;
        int lowest = 0, highest = 0;
        for (int i = 1; i < n; i++) {
            lowest = x[i] < x[lowest] ? i : lowest;
            highest = x[i] > x[highest] ? i : highest;
        }
        t->spike_places[2 * b] = lowest;
        t->spike_places[2 * b + 1] = highest;
        t->spike_values[2 * b] = t->bad[b] ? NAN_BITS >> 16 : bf16_code(bits_of(x[lowest]));
        t->spike_values[2 * b + 1] = t->bad[b] ? NAN_BITS >> 16 : bf16_code(bits_of(x[highest]));
    }
}

/* The minimum falls on the lowest code and the maximum on the highest. */
static void take_zero_points(const Codec *c, Tile *t)
{
    const int n = t->blocks * c->block;
    const double top = c->max_value;
    const float share = (top + 1) / (2 * top + 1), ratio = top / (top + 1);
    set_dead(c, t, t->x, INFINITY);
    fold_least(t->x, c->block, t, t->low);
    set_dead(c, t, t->x, -INFINITY);
    fold_greatest(t->x, c->block, t, t->high);
    for (int b = 0; b < t->blocks; b++) {
        const int some = t->low[b] <= t->high[b];
        const float low = some ? t->low[b] : 0, high = some ? t->high[b] : 0;
        t->zero_codes[b] = bf16_code(bits_of(low + (high - low) * share));
        t->zero[b] = float_of(t->zero_codes[b] << 16);
        t->need[b] = greatest(high - t->zero[b], (t->zero[b] - low) * ratio); /* of -0 and 0 the second */
    }
    spread(t->zero, t->blocks, c->block, t->spread);
    for (int i = 0; i < n; i++)
        t->x[i] -= t->spread[i];
}
