/* SPDX-License-Identifier: Apache-2.0 */
/* Codes to and from the bit planes of a message. */

#pragma once

#include "codec.h"

/* Neighbours are joined pair by pair until a byte is full: 1 + 1 bits, 2 + 2, 4 + 4. */
NOINLINE void join(const uint8_t *restrict codes, int pairs, int shift, int width, uint8_t *restrict out)
{
    const uint16_t mask = ((1 << width) - 1) * 0x101;
    for (int i = 0; i < pairs; i++) {
        uint16_t pair;
        memcpy(&pair, codes + 2 * i, 2);
        pair = pair >> shift & mask;
        out[i] = pair | pair >> (8 - width);
    }
}

NOINLINE void part(const uint8_t *restrict bytes, int pairs, int width, uint8_t *restrict out)
{
    const uint16_t mask = ((1 << width) - 1) * 0x101;
    for (int i = 0; i < pairs; i++) {
        const uint16_t pair = (bytes[i] | bytes[i] << (8 - width)) & mask;
        memcpy(out + 2 * i, &pair, 2);
    }
}

NOINLINE void merge(const uint8_t *restrict plane, int n, int shift, uint8_t *restrict codes)
{
    for (int i = 0; i < n; i++)
        codes[i] |= plane[i] << shift;
}

INLINE int64_t plane_at(const Plane *p, int64_t row, int64_t column)
{
    return p->offset + row * p->row_bytes + column * p->width / 8;
}

/* Stores codes of up to 8 bits. Behind them is room for zeros to fill the last byte up. */
static void put_bytes(const Field *field, uint8_t *message, int64_t column, int n, uint8_t *codes, const Tile *t)
{
    memset(codes + n, 0, 8);
    for (int k = 0; k < field->planes; k++) {
        const Plane *p = &field->plane[k];
        const uint8_t *from = codes;
        uint8_t *to = t->bytes, *other = t->more_bytes;
        const int bytes = (n * p->width + 7) / 8;
        for (int width = p->width, shift = p->shift; width < 8; width *= 2, shift = 0) {
            join(from, bytes * (4 / width), shift, width, to);
            from = to, to = other, other = (uint8_t *)from;
        }
        memcpy(message + plane_at(p, t->row, column), from, bytes);
    }
}

/* Tiles of several messages are read in turn, which hardware does not foresee: what comes two tiles later is fetched
 * ahead (a sum of 8 int8 messages takes 7.5 ms with it and 10.4 without). */
static void get_bytes(const Field *field, const uint8_t *message, int64_t column, int n, uint8_t *codes, const Tile *t)
{
    for (int k = 0; k < field->planes; k++) {
        const Plane *p = &field->plane[k];
        const uint8_t *from = message + plane_at(p, t->row, column);
        const int bytes = (n * p->width + 7) / 8;
        uint8_t *to = t->bytes, *other = t->more_bytes;
        for (int i = 0; i < bytes; i += CACHE_LINE)
            __builtin_prefetch(from + 2 * bytes + i);
        for (int width = 4; width >= p->width; width /= 2) {
            uint8_t *out = k == 0 && width == p->width ? codes : to;
            part(from, bytes * (4 / width), width, out);
            from = out, to = other, other = out;
        }
        if (k > 0)
            merge(from, n, p->shift, codes);
        else if (p->width == 8)
            memcpy(codes, from, n);
    }
}

/* The same for codes of any width; wide ones have one plane. */
static void put(
    const Field *field, uint8_t *message, int64_t column, int n, const uint32_t *restrict codes, const Tile *t)
{
    const Plane *p = &field->plane[0];
    uint8_t *out = message + plane_at(p, t->row, column);
    if (p->width == 32) {
        memcpy(out, codes, 4 * n);
    } else if (p->width == 16) {
        for (int i = 0; i < n; i++)
            memcpy(out + 2 * i, &codes[i], 2);
    } else {
        uint8_t *restrict narrow = t->codes;
        for (int i = 0; i < n; i++)
            narrow[i] = codes[i];
        put_bytes(field, message, column, n, narrow, t);
    }
}

static void get(
    const Field *field, const uint8_t *message, int64_t column, int n, uint32_t *restrict codes, const Tile *t)
{
    const Plane *p = &field->plane[0];
    const uint8_t *in = message + plane_at(p, t->row, column);
    if (p->width == 32) {
        memcpy(codes, in, 4 * n);
    } else if (p->width == 16) {
        for (int i = 0; i < n; i++) {
            uint16_t code;
            memcpy(&code, in + 2 * i, 2);
            codes[i] = code;
        }
    } else {
        uint8_t *restrict narrow = t->codes;
        get_bytes(field, message, column, n, narrow, t);
        for (int i = 0; i < n; i++)
            codes[i] = narrow[i];
    }
}

static void clear_padding(const Codec *c, uint8_t *message)
{
    const Field *fields[] = {&c->payload, &c->scale, &c->row_scale, &c->zero_point, &c->spike_value, &c->spike_index};
    for (int f = 0; f < LENGTH(fields); f++)
        for (int k = 0; k < fields[f]->planes; k++)
            memset(message + plane_at(&fields[f]->plane[k], c->rows, 0), 0, fields[f]->plane[k].padding);
}
