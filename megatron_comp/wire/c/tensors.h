/* SPDX-License-Identifier: Apache-2.0 */
/* Tensors in and out. */

#pragma once

#include "minifloat.h"

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

/* The values as they are: the first tensor's, or what `total` holds and theirs. */
static void add(const void *tensor, int dtype, int64_t at, int n, int first, float *restrict total)
{
    if (dtype == FP32) {
        const float *restrict in = (const float *)tensor + at;
        for (int i = 0; i < n; i++)
            total[i] = (first ? ZERO : total[i]) + in[i];
    } else if (dtype == BF16) {
        const uint16_t *restrict in = (const uint16_t *)tensor + at;
        for (int i = 0; i < n; i++) {
            const float value = float_of((uint32_t)in[i] << 16);
            total[i] = (first ? ZERO : total[i]) + value;
        }
    } else {
        const uint16_t *restrict in = (const uint16_t *)tensor + at;
        for (int i = 0; i < n; i++) {
            const float value = float_of(half_value(in[i]));
            total[i] = (first ? ZERO : total[i]) + value;
        }
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
