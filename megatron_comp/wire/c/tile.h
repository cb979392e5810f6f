/* SPDX-License-Identifier: Apache-2.0 */
/* A tile of a row: its memory, and all stages on it, there and back. */

#pragma once

#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "bytes.h"
#include "outliers.h"
#include "search.h"
#include "tensors.h"

/* Finite magnitudes above the limit become the limit. */
static void clamp(float *x, int n, float limit)
{
    const uint32_t above = bits_of(limit) + 1, finite = INFINITY_BITS - above;
    for (int i = 0; i < n; i++) {
        const uint32_t bits = bits_of(x[i]);
        const uint32_t limited = (bits & SIGN_BIT) | (above - 1);
        x[i] = float_of((bits & MAGNITUDE_BITS) - above < finite ? limited : bits);
    }
}

/* The tensor's values from the tile's first one on, subnormals flushed and large ones limited. */
static void load_tile(const Codec *c, const Tile *t, const void *tensor, int dtype, int64_t at)
{
    const float largest = dtype == FP32 ? FLT_MAX : dtype == BF16 ? float_of(0x7F7F0000) : HALF.max_value;
    load(tensor, dtype, at, t->values, t->x);
    if (largest > c->limit)
        clamp(t->x, t->values, c->limit);
    memset(t->x + t->values, 0, (t->blocks * c->block - t->values) * sizeof(float));
}

/* There and back: the transform is its own inverse. */
static void transform(const Codec *c, const Tile *t, float *x)
{
    if (c->hadamard_factor)
        hadamard(c, t, x);
}

/* Encodes `x`, transformed by now, which is overwritten. */
static void encode_tile(const Codec *c, Tile *t, uint8_t *message)
{
    const int64_t block = t->column / c->block;
    largest_magnitudes(t->x, c->block, t, t->need);
    clear_bad_blocks(c, t);

    if (c->spike) {
        take_spikes(c, t);
        put(&c->spike_value, message, 2 * block, 2 * t->blocks, t->spike_values, t);
        put(&c->spike_index, message, 2 * block, 2 * t->blocks, t->spike_places, t);
    }
    if (c->asym) {
        take_zero_points(c, t);
        put(&c->zero_point, message, block, t->blocks, t->zero_codes, t);
    }
    if (c->spike || c->asym)
        set_dead(c, t, t->x, 0);
    if (c->spike && !c->asym)
        largest_magnitudes(t->x, c->block, t, t->need);

    t->row_scale = 1;
    if (c->row_scaled) {
        take_row_scale(c, t);
        const uint32_t bits = bits_of(t->row_scale);
        put(&c->row_scale, message, 0, 1, &bits, t);
    }
    if (c->candidates > 1)
        search_scales(c, t);
    else
        take_scales(c, t, c->candidate[0], t->scale_codes);
    put(&c->scale, message, block, t->blocks, t->scale_codes, t);
    quantize(c, t);
    put_bytes(&c->payload, message, t->column, t->values, t->codes, t);
}

/* Codes and scales of a tile. */
static void read_tile(const Codec *c, Tile *t, const uint8_t *message)
{
    t->row_scale = 1;
    if (c->row_scaled) {
        uint32_t bits;
        get(&c->row_scale, message, 0, 1, &bits, t);
        t->row_scale = float_of(bits);
    }
    get(&c->scale, message, t->column / c->block, t->blocks, t->scale_codes, t);
    read_scales(c, t, t->scale_codes);
    get_bytes(&c->payload, message, t->column, t->values, t->codes, t);
}

/* A tile of `y` starts from its zero points; codes times scales are added to them. */
static void read_zero_points(const Codec *c, const Tile *t, const uint8_t *message)
{
    get(&c->zero_point, message, t->column / c->block, t->blocks, t->zero_codes, t);
    for (int b = 0; b < t->blocks; b++)
        t->zero[b] = float_of(t->zero_codes[b] << 16);
    spread(t->zero, t->blocks, c->block, t->y);
}

static void put_spikes_back(const Codec *c, const Tile *t, const uint8_t *message)
{
    const int64_t first = 2 * (t->column / c->block);
    get(&c->spike_value, message, first, 2 * t->blocks, t->spike_values, t);
    get(&c->spike_index, message, first, 2 * t->blocks, t->spike_places, t);
    for (int k = 0; k < 2 * t->blocks; k++)
        t->y[k / 2 * c->block + t->spike_places[k]] = float_of(t->spike_values[k] << 16);
}

/* Adds a message's tile, whose values are not codes times scales alone, to `total`. */
static void add_tile(const Codec *c, Tile *t, const uint8_t *message, int first)
{
    const int n = t->blocks * c->block;
    const float *restrict y = t->y;
    float *restrict total = t->total;
    if (c->asym)
        read_zero_points(c, t, message);
    read_tile(c, t, message);
    dequantize(c, t, !c->asym, t->y);
    if (c->spike)
        put_spikes_back(c, t, message);
    for (int i = 0; i < n; i++)
        total[i] = (first ? ZERO : total[i]) + y[i];
}

/* The sum of all messages, in their order, in `total`; with a transform, the sum of what was transformed. */
static void sum_tile(const Codec *c, Tile *t, const uint8_t *messages, int64_t stride, int ranks)
{
    for (int rank = 0; rank < ranks; rank++) {
        if (c->asym || c->spike) {
            add_tile(c, t, messages + rank * stride, rank == 0);
        } else {
            read_tile(c, t, messages + rank * stride);
            dequantize(c, t, rank == 0, t->total);
        }
    }
}

/* Values beyond `limit`, infinities too, become that. */
static void saturate(float *x, int n, const float limit)
{
    for (int i = 0; i < n; i++)
        x[i] = x[i] > limit ? limit : x[i] < -limit ? -limit : x[i];
}

static int64_t tile_values(const Codec *c) { return TILE < 8 * c->block ? 8 * c->block : TILE; }

/* A row's scale depends on all of it. */
static int64_t tile_values_to_encode(const Codec *c) { return c->row_scaled ? c->hidden : tile_values(c); }

/* Room for a tile that suits both codecs, or for a row. */
static int new_tile(Tile *t, const Codec *c, int64_t one, int64_t other)
{
    const int64_t wanted = one > other ? one : other, most = wanted < c->hidden ? wanted : c->hidden;
    const int64_t values = (most + LARGEST_BLOCK - 1) / LARGEST_BLOCK * LARGEST_BLOCK;
    const int64_t blocks = values / SMALLEST_BLOCK;
    float **of_value[] = {&t->x, &t->total, &t->y, &t->spread, &t->work};
    uint8_t **of_bytes[] = {&t->codes, &t->bytes, &t->more_bytes};
    float **of_block[] = {&t->need,       &t->low,   &t->high,  &t->zero,        &t->scale,
                          &t->reciprocal, &t->power, &t->error, &t->least_error, &t->best_reciprocal};
    uint32_t **of_codes[] = {&t->bad,        &t->scale_codes,  &t->tried_codes,
                             &t->zero_codes, &t->spike_places, &t->spike_values};

    const int64_t bytes = LENGTH(of_value) * 4 * values + LENGTH(of_bytes) * (values + CACHE_LINE)
        + LENGTH(of_block) * 4 * blocks + LENGTH(of_codes) * 8 * blocks;
    char *at = t->arena = aligned_alloc(CACHE_LINE, bytes);
    t->capacity = values;
    for (int k = 0; at && k < LENGTH(of_value); k++, at += 4 * values)
        *of_value[k] = (float *)at;
    for (int k = 0; at && k < LENGTH(of_bytes); k++, at += values + CACHE_LINE)
        *of_bytes[k] = (uint8_t *)at;
    for (int k = 0; at && k < LENGTH(of_block); k++, at += 4 * blocks)
        *of_block[k] = (float *)at;
    for (int k = 0; at && k < LENGTH(of_codes); k++, at += 8 * blocks)
        *of_codes[k] = (uint32_t *)at;
    return t->arena != NULL;
}

/* Sets the tile to values of a row from `column` on, as many as it has room for. */
static void aim(const Codec *c, Tile *t, int64_t row, int64_t column)
{
    const int64_t left = c->hidden - column;
    t->row = row;
    t->column = column;
    t->values = left < t->capacity ? left : t->capacity;
    t->blocks = (t->values + c->block - 1) / c->block;
}
