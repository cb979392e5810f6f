# SPDX-License-Identifier: Apache-2.0
"""What mixes the values of a block: the Hadamard transform, and sums in a fixed order.

Legend: N blocks of a tile, B values a block.
"""

import triton
import triton.language as tl


@triton.jit
def hadamard(x_NB, left, B: tl.constexpr):
    """Orthonormal Walsh-Hadamard transform, its own inverse; a block that is not whole in `left` values stays.

    Butterflies over neighbours first, then at distances 2, 4, ..., and one final multiplication: for B = 4,
    (1, 2, 3, 4) -> (3, -1, 7, -1) -> (10, -2, -4, 0) -> (5, -1, -2, 0).
    """
    y_NB = x_NB
    for stage in tl.static_range(B.bit_length() - 1):
        y_NB = _butterflies(y_NB, 1 << stage)
    whole = (tl.arange(0, x_NB.shape[0]) + 1) * B <= left
    return tl.where(whole[:, None], y_NB * (B**-0.5), x_NB)


@triton.jit
def before_end(left, N: tl.constexpr, B: tl.constexpr):
    """bool [N, B]: which values of a tile belong to the row, the first `left` ones."""
    return tl.arange(0, N)[:, None] * B + tl.arange(0, B)[None, :] < left


@triton.jit
def _butterflies(x_NB, D: tl.constexpr):
    """(a, b) -> (a + b, a - b) for all values a, b of a block at distance D."""
    N: tl.constexpr = x_NB.shape[0]
    B: tl.constexpr = x_NB.shape[1]
    a, b = tl.split(tl.permute(x_NB.reshape(N * B // (2 * D), 2, D), (0, 2, 1)))
    return tl.permute(tl.join(a + b, a - b), (0, 2, 1)).reshape(N, B)


@triton.jit
def pairwise_sum(x_NB, B: tl.constexpr):
    """[N]: neighbours are added first, then pairs of pairs, and so on."""
    N: tl.constexpr = x_NB.shape[0]
    total = x_NB
    for stage in tl.static_range(B.bit_length() - 1):
        left, right = tl.split(total.reshape(N, B >> (stage + 1), 2))
        total = left + right
    return total.reshape(N)
