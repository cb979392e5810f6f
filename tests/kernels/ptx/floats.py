# SPDX-License-Identifier: Apache-2.0
"""What a GPU's float instructions do to bits, where numpy's own operations do something else.

Arguments and results are bits: uint32 for fp32, uint16 for fp16 and bf16. Only `flushed` flushes subnormals.
"""

import numpy as np

F16, F32, F64 = np.float16, np.float32, np.float64
U16, U32, U64 = np.uint16, np.uint32, np.uint64

NAN = {F32: U32(0x7FFFFFFF), F16: U16(0x7FFF)}  # as arithmetic on a GPU makes it
BF16_NAN = U32(0x7FFF)


def bits_of(x: np.ndarray) -> np.ndarray:
    """Of the floats, any NaN as a GPU makes it."""
    dtype = x.dtype.type
    return np.where(np.isnan(x), NAN[dtype], x.view(NAN[dtype].dtype))


def flushed(x: np.ndarray) -> np.ndarray:
    """fp32 with zeros of their sign for subnormals."""
    return np.where(x & U32(0x7F800000), x, x & U32(0x80000000))


def fma(dtype: type, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """fp32 or fp16 a * b + c, rounded once.

    The product is exact in fp64. The sum is not: it is rounded to odd (the last bit set if anything was lost), after
    which rounding to fp32 or fp16 cannot go wrong twice.
    """
    a, b, c = (x.view(dtype).astype(F64) for x in (a, b, c))
    product = a * b
    total = product + c
    back = total - product
    lost = (product - (total - back)) + (c - back)
    bits = total.view(U64)
    odd = np.where((lost > 0) == (total > 0), bits | U64(1), bits - U64(1)).view(F64)
    even = bits & U64(1) == 0
    total = np.where(np.isfinite(total) & (lost != 0) & even, odd, total)
    return bits_of(total.astype(dtype))


def least(a: np.ndarray, b: np.ndarray, dtype: type) -> np.ndarray:
    """min of floats: -0 is below 0, and a number wins over NaN."""
    x, y = a.view(dtype), b.view(dtype)
    result = np.where(x < y, a, b)
    result = np.where((x == 0) & (y == 0), a | b, result)
    return _numbers_win(a, b, result, dtype)


def greatest(a: np.ndarray, b: np.ndarray, dtype: type) -> np.ndarray:
    x, y = a.view(dtype), b.view(dtype)
    result = np.where(x > y, a, b)
    result = np.where((x == 0) & (y == 0), a & b, result)
    return _numbers_win(a, b, result, dtype)


def _numbers_win(a, b, result, dtype):
    no_a, no_b = np.isnan(a.view(dtype)), np.isnan(b.view(dtype))
    result = np.where(no_a, b, np.where(no_b, a, result))
    return np.where(no_a & no_b, NAN[dtype], result).astype(a.dtype)


def to_bf16(x: np.ndarray, rounding: str) -> np.ndarray:
    """fp32 to bf16, uint32: to nearest even ("rn") or towards zero ("rz")."""
    wide = x.astype(U64)
    if rounding == "rn":
        wide += U64(0x7FFF) + ((wide >> U64(16)) & U64(1))
    return np.where(np.isnan(x.view(F32)), BF16_NAN, (wide >> U64(16)).astype(U32) & U32(0xFFFF))


def to_f16(x: np.ndarray) -> np.ndarray:
    """fp32 to fp16, to nearest even; uint32."""
    return bits_of(x.view(F32).astype(F16)).astype(U32)


def halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The low and the high 16 bits of a packed pair, uint16."""
    return (x & U32(0xFFFF)).astype(U16), (x >> U32(16)).astype(U16)


def pair(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(U32) | (high.astype(U32) << U32(16))
