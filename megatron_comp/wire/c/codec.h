/* SPDX-License-Identifier: Apache-2.0 */
/* What a codec and a tile are, and the words that all stages use. */

#pragma once

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
/* Inlined, these loops would lose `restrict`, and with it their vector code. */
#define NOINLINE static __attribute__((noinline))
#define LENGTH(array) (int)(sizeof(array) / sizeof((array)[0]))
#define ZERO -0.0f /* the one that changes nothing that it is added to */
#define NAN_BITS 0x7FC00000u
#define INFINITY_BITS 0x7F800000u
#define MAGNITUDE_BITS 0x7FFFFFFFu
#define SIGN_BIT 0x80000000u

/* Values of a tile, 4 KiB of fp32, so that what a stage touches stays in the first cache: 2048 take up to 1.5 times as
 * long. Tiles have 8 blocks at least, so that they start on a byte in every plane. */
enum { TILE = 1024, SMALLEST_BLOCK = 8, LARGEST_BLOCK = 256, CACHE_LINE = 64 };

/* Numbered as in native.py. */
enum { FP32, BF16, FP16 };
enum { ELEMENT_MINIFLOAT, ELEMENT_INTEGER, ELEMENT_LEVELS };
enum { SCALE_POWER_OF_TWO, SCALE_SMALL_FLOAT, SCALE_FP16, SCALE_BF16, SCALE_FP32 };

typedef struct {
    int32_t mantissa_bits;
    uint32_t smallest_normal; /* as the bits of an fp32 */
    uint32_t max_code;        /* magnitude code of the largest finite value */
    uint32_t after_max;       /* bits of the fp32 that the next code stands for: infinity or NaN; later ones are NaN */
    float max_value;
} Minifloat;

/* One bit plane of a field: `width` bits of each code from bit `shift` on. */
typedef struct {
    int64_t offset, row_bytes, padding;
    int32_t shift, width;
} Plane;

typedef struct {
    int32_t planes;
    Plane plane[3];
} Field;

/* A codec and the layout of its message of [rows, hidden]. */
typedef struct {
    int64_t rows, hidden, nbytes;
    int32_t block;
    float limit;           /* larger magnitudes count as this */
    float hadamard_factor; /* 0: no transform */
    int32_t asym, spike;

    int32_t element_kind, bits;
    float value[32];       /* of the element's codes, if it has up to 5 bits */
    float lowest, highest; /* codes of integers */
    Minifloat element;     /* of minifloats */
    float threshold[15];   /* of levels: formats.Levels.thresholds */

    int32_t scale_kind;
    uint32_t nan_code;
    /* Powers of two: the exponent of need + round_up, less max_exponent, plus 1 if the fraction is above ceil_above. */
    int32_t bias, max_exponent, largest_code, underflow_to_zero;
    uint32_t round_up, ceil_above;
    /* Others: need / max_value, within smallest .. largest unless it is 0. */
    float max_value, smallest, largest;
    Minifloat small_float;
    int32_t row_scaled;
    float row_divisor, smallest_row_scale;
    int32_t candidates;
    float candidate[8];

    Field payload, scale, row_scale, zero_point, spike_value, spike_index;
} Codec;

/* Some values of a row. Per value: `x` is what is encoded, `y` what is decoded, `total` a sum; `spread`, `work` and
 * bytes are for use within a stage. The arrays below are per block. */
typedef struct {
    void *arena;
    int64_t capacity;
    int64_t row, column; /* of the first value */
    int32_t values, blocks;
    float *x, *total, *y, *spread, *work;
    uint8_t *codes, *bytes, *more_bytes;
    float *need, *low, *high, *zero, *scale, *reciprocal, *best_reciprocal, *power, *error, *least_error;
    uint32_t *bad, *scale_codes, *tried_codes, *zero_codes, *spike_places, *spike_values;
    float row_scale;
} Tile;
