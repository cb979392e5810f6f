/* Codecs on a CPU: the stages of reference.py in C, the same bytes and sums to the bit.
 *
 * One source for all formats: what tells them apart is data, which native.py fills in from the rows of formats.py and
 * the sections of message.py. A row is worked on in tiles of values that stay in a core's first cache, one stage after
 * the other. Each stage is a loop over flat arrays, one number per value, that compilers turn into vector code of
 * whatever width the machine has; what there is one of per block is first spread out to its values. (Loops over blocks
 * whose size is a constant took longer: summing two int4 messages of block 32, 19.6 cycles per 16 values against 17.3.)
 *
 * Needs IEEE arithmetic: no -ffast-math and no contraction into fused multiply-adds. Assumes a little-endian machine.
 * Arrays have room for whole blocks, so that loops need no tails.
 */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

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
    int64_t rows, hidden;
    int32_t block;
    float limit;           /* larger magnitudes count as this */
    float hadamard_factor; /* 0: no transform */
    int32_t asym, spike;

    int32_t integer, bits;
    float lowest, highest; /* codes of integers */
    Minifloat element;     /* of minifloats */

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

INLINE uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
INLINE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

/* Minifloats. IEEE half precision is one of them. */

static const Minifloat HALF = {10, (127 - 14) << 23, 0x7BFF, INFINITY_BITS, 65504.0f};

/* scales.minifloat_codes: nearest magnitude code of a magnitude's bits, ties to even, saturating.
 *
 * Adding 2^(23 - mantissa_bits) times the value's own power of two rounds it to the format's grid. Only the low 16 bits
 * of the result are the code's: the power of two that was added is still in the others. */
INLINE uint32_t minifloat_code(uint32_t magnitude, Minifloat f)
{
    const uint32_t drop = 23 - f.mantissa_bits;
    magnitude = smaller(magnitude, bits_of(f.max_value));
    const uint32_t power = larger(magnitude & INFINITY_BITS, f.smallest_normal);
    const uint32_t steps = bits_of(float_of(magnitude) + float_of(power + (drop << 23)));
    return steps + (power >> drop) - (f.smallest_normal >> drop);
}

/* Bits of the fp32 that a magnitude code stands for.
 *
 * Under the exponent field 0, n = 2^-bias * 1.mantissa must become 2n - 2^(1 - bias), which is exact and below n; for
 * other fields it is not below n. */
INLINE uint32_t minifloat_value(uint32_t code, Minifloat f)
{
    const float normal = float_of((code << (23 - f.mantissa_bits)) + f.smallest_normal - (1 << 23));
    const float subnormal = normal + (normal - float_of(f.smallest_normal));
    return smaller(bits_of(normal), bits_of(subnormal));
}

/* The same for codes that may be no numbers. */
INLINE uint32_t any_minifloat_value(uint32_t code, Minifloat f)
{
    const uint32_t special = code > f.max_code + 1 ? NAN_BITS : f.after_max;
    const uint32_t value = minifloat_value(code, f);
    return code > f.max_code ? special : value;
}

INLINE uint32_t half_value(uint32_t code)
{
    return (code & 0x8000) << 16 | any_minifloat_value(code & 0x7FFF, HALF);
}

INLINE uint32_t half_code(uint32_t bits)
{
    const uint32_t magnitude = bits & MAGNITUDE_BITS;
    uint32_t code = minifloat_code(magnitude, HALF) & 0x7FFF;
    code = magnitude >= 0x477FF000 ? 0x7C00 : code; /* from 65520 on, infinity is nearer */
    code = magnitude > INFINITY_BITS ? 0x7E00 : code;
    return (bits >> 16 & 0x8000) | code;
}

INLINE uint32_t bf16_code(uint32_t bits)
{
    const uint32_t rounded = bits + 0x7FFF + (bits >> 16 & 1);
    return ((bits & MAGNITUDE_BITS) > INFINITY_BITS ? NAN_BITS : rounded) >> 16;
}

/* Tensors in and out. */

/* Subnormals become zeros of their sign. */
static void load(const void *tensor, int dtype, int64_t at, int n, float *restrict x)
{
    if (dtype == FP32) {
        const uint32_t *restrict in = (const uint32_t *)tensor + at;
        for (int i = 0; i < n; i++)
            x[i] = float_of(in[i] & INFINITY_BITS ? in[i] : in[i] & SIGN_BIT);
    } else if (dtype == BF16) {
        const uint16_t *restrict in = (const uint16_t *)tensor + at;
        for (int i = 0; i < n; i++) {
            const uint16_t bits = in[i] & 0x7F80 ? in[i] : in[i] & 0x8000;
            x[i] = float_of((uint32_t)bits << 16);
        }
    } else {
        const uint16_t *restrict in = (const uint16_t *)tensor + at;
        for (int i = 0; i < n; i++)
            x[i] = float_of(half_value(in[i]));
    }
}

static void store(const float *restrict y, int n, void *tensor, int dtype, int64_t at)
{
    if (dtype == FP32) {
        memcpy((float *)tensor + at, y, n * sizeof(float));
    } else if (dtype == BF16) {
        uint16_t *restrict out = (uint16_t *)tensor + at;
        for (int i = 0; i < n; i++)
            out[i] = bf16_code(bits_of(y[i]));
    } else {
        uint16_t *restrict out = (uint16_t *)tensor + at;
        for (int i = 0; i < n; i++)
            out[i] = half_code(bits_of(y[i]));
    }
}

/* Bytes. Neighbours are joined pair by pair until a byte is full: 1 + 1 bits, 2 + 2, 4 + 4. */

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

/* From blocks to values and back. */

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

/* One number per block: neighbours are joined, then pairs of pairs, and so on. */
#define DEFINE_FOLD(operation)                                                                                         \
    NOINLINE void operation##_of_pairs(const float *restrict in, int pairs, float *restrict out)                       \
    {                                                                                                                  \
        for (int i = 0; i < pairs; i++)                                                                                \
            out[i] = operation(in[2 * i], in[2 * i + 1]);                                                              \
    }                                                                                                                  \
    static void fold_##operation(const float *x, const Codec *c, const Tile *t, float *out)                            \
    {                                                                                                                  \
        float *to = t->work, *other = to + t->blocks * c->block / 2;                                                   \
        for (int n = t->blocks * c->block / 2; n >= t->blocks; n /= 2) {                                               \
            operation##_of_pairs(x, n, n == t->blocks ? out : to);                                                     \
            x = to, to = other, other = (float *)x;                                                                    \
        }                                                                                                              \
    }

DEFINE_FOLD(least)
DEFINE_FOLD(greatest)
DEFINE_FOLD(sum)
DEFINE_FOLD(peak)

/* Transform. */

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

/* Scale. */

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
    fold_least(t->x, c, t, t->low);
    set_dead(c, t, t->x, -INFINITY);
    fold_greatest(t->x, c, t, t->high);
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

static void take_row_scale(const Codec *c, Tile *t)
{
    float largest = 0;
    for (int b = 0; b < t->blocks; b++)
        largest = greatest(largest, t->need[b]);
    t->row_scale = greatest(largest / c->row_divisor, c->smallest_row_scale);
}

INLINE uint32_t float_scale_code(const Codec *c, int kind, float need, float row_scale)
{
    const float wanted = need / c->max_value;
    if (kind == SCALE_SMALL_FLOAT)
        return minifloat_code(bits_of(wanted / row_scale), c->small_float) & 0xFF;
    const float raised = wanted > 0 ? greatest(wanted, c->smallest) : wanted;
    const uint32_t limited = bits_of(least(raised, c->largest));
    return kind == SCALE_FP16 ? half_code(limited) : kind == SCALE_BF16 ? bf16_code(limited) : limited;
}

INLINE float scale_value(const Codec *c, int kind, uint32_t code, float row_scale)
{
    uint32_t bits = code;
    if (kind == SCALE_POWER_OF_TWO) {
        const uint32_t exponent = code + 127 - c->bias;
        bits = code == c->nan_code ? NAN_BITS : exponent ? exponent << 23 : 1 << 22;
    } else if (kind == SCALE_SMALL_FLOAT) {
        return float_of(any_minifloat_value(code, c->small_float)) * row_scale;
    } else if (kind == SCALE_FP16) {
        bits = half_value(code);
    } else if (kind == SCALE_BF16) {
        bits = code << 16;
    }
    return float_of(bits);
}

/* Below 0 where the scale would be below the smallest. */
INLINE int power_of_two_code(const Codec *c, float need, int shift)
{
    const uint32_t bits = bits_of(need) + c->round_up;
    const int up = ((bits & 0x7FFFFF) > c->ceil_above) + shift;
    const int code = (int)(bits >> 23) - 127 - c->max_exponent + up + c->bias;
    return code > c->largest_code ? c->largest_code : code;
}

INLINE void take_codes_of(const Codec *codec, const Tile *t, const int kind, float candidate, uint32_t *restrict codes)
{
    const Codec c = *codec;
    const int blocks = t->blocks, shift = candidate;
    const float row_scale = t->row_scale, *restrict need = t->need;
    const uint32_t *restrict bad = t->bad;
    float *restrict alive = t->reciprocal;
    for (int b = 0; b < blocks; b++) {
        uint32_t code;
        if (kind == SCALE_POWER_OF_TWO) {
            const int wanted = power_of_two_code(&c, need[b], shift);
            code = wanted < 0 ? 0 : wanted;
            alive[b] = (wanted < 0) & c.underflow_to_zero ? 0 : 1;
        } else {
            code = float_scale_code(&c, kind, need[b] * candidate, row_scale);
            alive[b] = 1;
        }
        codes[b] = bad[b] ? c.nan_code : code;
    }
}

INLINE void read_scales_of(const Codec *codec, const Tile *t, const int kind, const uint32_t *restrict codes)
{
    const Codec c = *codec;
    const int blocks = t->blocks;
    const float row_scale = t->row_scale;
    float *restrict scale = t->scale;
    for (int b = 0; b < blocks; b++)
        scale[b] = scale_value(&c, kind, codes[b], row_scale);
}

#define OF_ITS_KIND(function, c, ...)                                                                                  \
    switch ((c)->scale_kind) {                                                                                         \
    case SCALE_POWER_OF_TWO: function(c, t, SCALE_POWER_OF_TWO, __VA_ARGS__); break;                                   \
    case SCALE_SMALL_FLOAT: function(c, t, SCALE_SMALL_FLOAT, __VA_ARGS__); break;                                     \
    case SCALE_FP16: function(c, t, SCALE_FP16, __VA_ARGS__); break;                                                   \
    case SCALE_BF16: function(c, t, SCALE_BF16, __VA_ARGS__); break;                                                   \
    case SCALE_FP32: function(c, t, SCALE_FP32, __VA_ARGS__); break;                                                   \
    }

static void read_scales(const Codec *c, const Tile *t, const uint32_t *codes)
{
    OF_ITS_KIND(read_scales_of, c, codes)
}

/* Codes, their values, and the reciprocals to multiply values by, 0 where all becomes 0. */
static void take_scales(const Codec *c, const Tile *t, float candidate, uint32_t *codes)
{
    const int blocks = t->blocks;
    const float *restrict scale = t->scale;
    float *restrict reciprocal = t->reciprocal;
    OF_ITS_KIND(take_codes_of, c, candidate, codes)
    read_scales(c, t, codes);
    for (int b = 0; b < blocks; b++)
        reciprocal[b] = scale[b] > 0 ? reciprocal[b] / scale[b] : 0;
}

static void quantize(const Codec *c, const Tile *t);
static void dequantize(const Codec *c, const Tile *t, int first, float *out);

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

/* Quantize. */

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

/* What the smallest normal of fp32 stands for under normal codes is what the code 1 stands for in the element. */
INLINE float normal_unit(const Codec *c, const int mantissa_bits)
{
    return float_of(c->element.smallest_normal + ((126 - mantissa_bits) << 23));
}

/* A magnitude code of an element as that of a float with as many mantissa bits and no subnormals but zero.
 *
 * Exponents grow by mantissa_bits. The codes of subnormals are stretched: with two mantissa bits to 4 for each up to 1,
 * and 2 for each up to 2, so that 0 1 2 3 4 5 become 0 4 8 10 12 13. */
INLINE uint8_t normal_code(uint8_t magnitude, const int mantissa_bits)
{
    uint8_t normal = magnitude;
    for (int k = 0; k < mantissa_bits; k++) {
        const uint8_t up_to = 1 << (mantissa_bits - k), stretched = magnitude < up_to ? magnitude : up_to;
        normal += (uint8_t)(stretched << k);
    }
    return normal;
}

/* Elements without infinities and NaNs, which have 6 bits at most. Bytes hold a sign and a 7-bit normal code, 64 of
 * them in a vector where fp32 has 16; moved to their place in an fp32, they lack a power of two, `unit`. */
INLINE void add_short_minifloats(
    const Codec *c, const Tile *t, int n, const int mantissa_bits, const int first, float *restrict out)
{
    const int up = 8 - c->bits, shift = 23 - mantissa_bits;
    const uint8_t sign = 1 << (c->bits - 1), *restrict codes = t->codes;
    const float *restrict scale = t->spread, unit = normal_unit(c, mantissa_bits);
    const uint32_t mask = SIGN_BIT | ((0x80 << shift) - 1);
    uint8_t *restrict normal = t->bytes;
    for (int i = 0; i < n; i++) {
        const uint8_t magnitude = codes[i] & (uint8_t)(sign - 1);
        normal[i] = normal_code(magnitude, mantissa_bits) | (uint8_t)((codes[i] & sign) << up);
    }
    for (int i = 0; i < n; i++) {
        const uint32_t extended = (int8_t)normal[i];
        out[i] = (first ? ZERO : out[i]) + float_of(extended << shift & mask) * unit * scale[i];
    }
}

/* Elements of 8 bits, by the upper halves of fp32s. */
INLINE void add_long_minifloats(
    const Codec *c, const Tile *t, int n, const int mantissa_bits, const int first, float *restrict out)
{
    const uint8_t after_max = c->element.max_code + 1, *restrict codes = t->codes;
    const uint16_t its_value = c->element.after_max >> 16;
    const float *restrict scale = t->spread, unit = normal_unit(c, mantissa_bits);
    uint16_t *restrict half = (uint16_t *)t->work;
    for (int i = 0; i < n; i++) {
        const uint8_t magnitude = codes[i] & 0x7F;
        const uint16_t normal = (uint16_t)normal_code(magnitude, mantissa_bits) << (7 - mantissa_bits);
        const uint16_t special = magnitude > after_max ? NAN_BITS >> 16 : its_value;
        const uint16_t sign = (uint16_t)(codes[i] & 0x80) << 8;
        half[i] = (magnitude < after_max ? normal : special) | sign;
    }
    for (int i = 0; i < n; i++)
        out[i] = (first ? ZERO : out[i]) + float_of((uint32_t)half[i] << 16) * unit * scale[i];
}

INLINE void add_integers(const Codec *c, const Tile *t, int n, const int first, float *restrict out)
{
    const uint8_t half = 1 << (c->bits - 1), *restrict codes = t->codes;
    const float *restrict scale = t->spread;
    for (int i = 0; i < n; i++)
        out[i] = (first ? ZERO : out[i]) + (float)(int8_t)((codes[i] ^ half) - half) * scale[i];
}

#ifdef __AVX512F__
/* Elements of up to 4 bits, whose 16 values fit into a register, and int8, whose codes are its values. Blocks of 16 and
 * more give each register one scale. (Against the loops above, with scales spread out to values, summing 4 messages takes
 * about half the time with mxfp4, three quarters with int8.) Works on whole registers, for which the arrays have room. */
INLINE void add_registers(const Codec *c, const Tile *t, int n, const int is_int8, const int first, float *out)
{
    float values[16];
    const uint32_t sign = 1u << (c->bits - 1);
    for (uint32_t code = 0; !is_int8 && code < 2 * sign; code++)
        if (c->integer)
            values[code] = (float)code - (code < sign ? 0 : 2 * sign);
        else
            values[code] = float_of((code & sign) << (32 - c->bits) | minifloat_value(code & (sign - 1), c->element));
    const __m512 table = is_int8 ? _mm512_setzero_ps() : _mm512_loadu_ps(values);
    const int shift = __builtin_ctz(c->block);
    for (int i = 0; i < n; i += 16) {
        const __m128i codes = _mm_loadu_si128((const __m128i *)(t->codes + i));
        const __m512 value = is_int8 ? _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes))
                                     : _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), table);
        const __m512 scaled = _mm512_mul_ps(value, _mm512_set1_ps(t->scale[i >> shift]));
        _mm512_storeu_ps(out + i, first ? scaled : _mm512_add_ps(_mm512_loadu_ps(out + i), scaled));
    }
}
#endif

INLINE void dequantize_to(const Codec *c, const Tile *t, int n, const int first, float *out)
{
#ifdef __AVX512F__
    if (c->block >= 16 && c->bits <= 4) {
        add_registers(c, t, n, 0, first, out);
        return;
    }
    if (c->block >= 16 && c->integer && c->bits == 8) {
        add_registers(c, t, n, 1, first, out);
        return;
    }
#endif
    spread(t->scale, t->blocks, c->block, t->spread);
    switch (c->integer ? 0 : c->bits < 8 ? c->element.mantissa_bits : -c->element.mantissa_bits) {
    case 0: add_integers(c, t, n, first, out); break;
    case 1: add_short_minifloats(c, t, n, 1, first, out); break;
    case 2: add_short_minifloats(c, t, n, 2, first, out); break;
    case 3: add_short_minifloats(c, t, n, 3, first, out); break;
    case -2: add_long_minifloats(c, t, n, 2, first, out); break;
    case -3: add_long_minifloats(c, t, n, 3, first, out); break;
    }
}

/* Adds the values of the codes, times the scales, to `out`, or sets `out` to the first of them. */
static void dequantize(const Codec *c, const Tile *t, int first, float *out)
{
    const int n = t->blocks * c->block;
    if (first)
        dequantize_to(c, t, n, 1, out);
    else
        dequantize_to(c, t, n, 0, out);
}

/* Tiles. */

/* The tensor's values from the tile's first one on, subnormals flushed and large ones limited. */
static void load_tile(const Codec *c, const Tile *t, const void *tensor, int dtype, int64_t at)
{
    const float largest = dtype == FP32 ? FLT_MAX : dtype == BF16 ? float_of(0x7F7F0000) : HALF.max_value;
    load(tensor, dtype, at, t->values, t->x);
    if (largest > c->limit)
        clamp(t->x, t->values, c->limit);
    memset(t->x + t->values, 0, (t->blocks * c->block - t->values) * sizeof(float));
}

/* Encodes `x`, which is overwritten. */
static void encode_tile(const Codec *c, Tile *t, uint8_t *message)
{
    const int64_t block = t->column / c->block;
    if (c->hadamard_factor)
        hadamard(c, t, t->x);
    fold_peak(t->x, c, t, t->need);
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
        fold_peak(t->x, c, t, t->need);

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

/* Adds a message's tile to `total`; values beyond `limit` count as that. */
static void add_tile(const Codec *c, Tile *t, const uint8_t *message, int first, float limit)
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
    if (c->hadamard_factor)
        hadamard(c, t, t->y);
    for (int i = 0; i < n; i++) {
        const float limited = y[i] > limit ? limit : y[i] < -limit ? -limit : y[i];
        total[i] = (first ? ZERO : total[i]) + limited;
    }
}

/* The sum of all messages, in their order, in `total`. */
static void sum_tile(const Codec *c, Tile *t, const uint8_t *messages, int64_t stride, int ranks, float limit)
{
    const int plain = !c->asym && !c->spike && !c->hadamard_factor && limit == INFINITY;
    for (int rank = 0; rank < ranks; rank++) {
        if (plain) {
            read_tile(c, t, messages + rank * stride);
            dequantize(c, t, rank == 0, t->total);
        } else {
            add_tile(c, t, messages + rank * stride, rank == 0, limit);
        }
    }
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

static void clear_padding(const Codec *c, uint8_t *message)
{
    const Field *fields[] = {&c->payload, &c->scale, &c->row_scale, &c->zero_point, &c->spike_value, &c->spike_index};
    for (int f = 0; f < LENGTH(fields); f++)
        for (int k = 0; k < fields[f]->planes; k++)
            memset(message + plane_at(&fields[f]->plane[k], c->rows, 0), 0, fields[f]->plane[k].padding);
}

/* What native.py calls; 0, or 1 if memory is short. Tensors are contiguous [rows, hidden], messages `stride` bytes
 * apart. Bytes of a message that carry nothing become zeros. */

#define FOR_TILES(c, t)                                                                                                \
    for (int64_t row = 0; row < (c)->rows; row++)                                                                      \
        for (int64_t column = 0; column < (c)->hidden && (aim(c, t, row, column), 1); column += (t)->capacity)

int encode(const Codec *c, const void *tensor, int dtype, uint8_t *message)
{
    Tile t;
    if (!new_tile(&t, c, 0, tile_values_to_encode(c)))
        return 1;
    FOR_TILES(c, &t) {
        load_tile(c, &t, tensor, dtype, row * c->hidden + column);
        encode_tile(c, &t, message);
    }
    clear_padding(c, message);
    free(t.arena);
    return 0;
}

int decode_sum(const Codec *c, const uint8_t *messages, int64_t stride, int ranks, void *tensor, int dtype)
{
    Tile t;
    if (!new_tile(&t, c, tile_values(c), 0))
        return 1;
    /* Half precision cannot hold what a power-of-two scale may round 65504 up to. */
    const float limit = dtype == FP16 ? HALF.max_value : INFINITY;
    FOR_TILES(c, &t) {
        sum_tile(c, &t, messages, stride, ranks, limit);
        store(t.total, t.values, tensor, dtype, row * c->hidden + column);
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
    FOR_TILES(c, &t) {
        sum_tile(c, &t, messages, stride, ranks, INFINITY);
        aim(second, &t, row, column);
        load_tile(second, &t, t.total, FP32, 0);
        encode_tile(second, &t, message);
    }
    clear_padding(second, message);
    free(t.arena);
    return 0;
}

int64_t codec_size(void) { return sizeof(Codec); }
