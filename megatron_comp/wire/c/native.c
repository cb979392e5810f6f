/* SPDX-License-Identifier: Apache-2.0 */
/* Codecs on a CPU: the stages of reference.py in C, the same bytes and sums to the bit.
 *
 * One source for all formats: what tells them apart is data, which native.py fills in from the rows of formats.py and
 * the sections of message.py. A row is worked on in tiles of values that stay in a core's first cache, one stage after
 * the other. Each stage is a loop over flat arrays, one number per value, that compilers turn into vector code of
 * whatever width the machine has; what there is one of per block is first spread out to its values. (Loops over blocks
 * whose size is a constant took longer: summing two int4 messages of block 32, 19.6 cycles per 16 values against 17.3.)
 *
 * One compilation, and one file a stage, each of which includes what it builds on:
 *
 *     codec.h        what a codec and a tile are       minifloat.h   numbers by their bits
 *     tensors.h      tensors in and out                bytes.h       codes to and from bit planes
 *     blocks.h       from blocks to values and back, the transform
 *     outliers.h     NaN, spikes and zero points       scale.h       scales
 *     quantize.h     values to codes                   dequantize.h  codes to values, added up
 *     search.h       the best of several scales        tile.h        all stages, on a tile
 *
 * Needs IEEE arithmetic: no -ffast-math and no contraction into fused multiply-adds. Assumes a little-endian machine.
 * Arrays have room for whole blocks, so that loops need no tails.
 */

#include <math.h>
#include <stdlib.h>

#include "tile.h"

/* What native.py calls; 0, or 1 if memory is short. Tensors are contiguous [rows, hidden], messages `stride` bytes
 * apart. Bytes of a message that carry nothing become zeros. Slices are consecutive rows, with a codec for each that
 * knows how many; they have one format. */

#define FOR_TILES(c, t)                                                                                                \
    for (int64_t row = 0; row < (c)->rows; row++)                                                                      \
        for (int64_t column = 0; column < (c)->hidden && (aim(c, t, row, column), 1); column += (t)->capacity)

/* The messages of the slices of a sum of tensors, one after another; the ranks' tensors follow one another. */
int sum_encode(
    const Codec *const *codecs, int slices, const void *tensors, int dtype, int ranks, uint8_t *message)
{
    Tile t;
    int64_t at = 0, values = 0;
    for (int slice = 0; slice < slices; slice++)
        values += codecs[slice]->rows * codecs[slice]->hidden;
    if (!new_tile(&t, codecs[0], 0, tile_values_to_encode(codecs[0])))
        return 1;
    for (int slice = 0; slice < slices; slice++) {
        const Codec *c = codecs[slice];
        FOR_TILES(c, &t) {
            const int64_t first = at + row * c->hidden + column;
            if (ranks == 1) {
                load_tile(c, &t, tensors, dtype, first);
            } else {
                for (int rank = 0; rank < ranks; rank++)
                    add(tensors, dtype, first + rank * values, t.values, rank == 0, t.total);
                load_tile(c, &t, t.total, FP32, 0);
            }
            transform(c, &t, t.x);
            encode_tile(c, &t, message);
        }
        clear_padding(c, message);
        at += c->rows * c->hidden;
        message += c->nbytes;
    }
    free(t.arena);
    return 0;
}

/* The sum of messages, from value `at` of the tensor on. */
static void sum_messages(
    const Codec *c, Tile *t, const uint8_t *messages, int64_t stride, int ranks, float limit, void *tensor, int dtype,
    int64_t at)
{
    FOR_TILES(c, t) {
        sum_tile(c, t, messages, stride, ranks);
        transform(c, t, t->total);
        if (limit < INFINITY)
            saturate(t->total, t->values, limit);
        store(t->total, t->values, tensor, dtype, at + row * c->hidden + column);
    }
}

int decode_sum(const Codec *c, const uint8_t *messages, int64_t stride, int ranks, void *tensor, int dtype)
{
    Tile t;
    if (!new_tile(&t, c, tile_values(c), 0))
        return 1;
    /* Half precision cannot hold what a power-of-two scale may round 65504 up to. Sums may become infinite. */
    const float limit = ranks == 1 && dtype == FP16 ? HALF.max_value : INFINITY;
    sum_messages(c, &t, messages, stride, ranks, limit, tensor, dtype, 0);
    free(t.arena);
    return 0;
}

/* A message in each slot, so many in turn to add up for each slice. */
int decode_slices(
    const Codec *const *codecs, int slices, const uint8_t *slots, int64_t stride, int each, void *tensor, int dtype)
{
    Tile t;
    int64_t at = 0;
    if (!new_tile(&t, codecs[0], tile_values(codecs[0]), 0))
        return 1;
    for (int slice = 0; slice < slices; slice++) {
        const Codec *c = codecs[slice];
        sum_messages(c, &t, slots + slice * each * stride, stride, each, INFINITY, tensor, dtype, at);
        at += c->rows * c->hidden;
    }
    free(t.arena);
    return 0;
}

int decode_sum_encode(
    const Codec *c, const uint8_t *messages, int64_t stride, int ranks, const Codec *second, uint8_t *message)
{
    Tile t;
    if (!new_tile(&t, c, tile_values(c), tile_values_to_encode(second)))
        return 1;
    /* Blocks that both transform stay transformed. */
    const int stays = c->hadamard_factor && second->hadamard_factor && c->block == second->block;
    FOR_TILES(c, &t) {
        sum_tile(c, &t, messages, stride, ranks);
        if (!stays)
            transform(c, &t, t.total);
        aim(second, &t, row, column);
        load_tile(second, &t, t.total, FP32, 0);
        if (!stays)
            transform(second, &t, t.x);
        encode_tile(second, &t, message);
    }
    clear_padding(second, message);
    free(t.arena);
    return 0;
}

int64_t codec_size(void) { return sizeof(Codec); }
