# SPDX-License-Identifier: Apache-2.0
"""Messages to the message of their sum, which both the first codec and the second may lay out in their own way."""

import itertools

import kernel_cases as cases
import pytest
import torch

from megatron_comp.wire.formats import SCALES, Format

DTYPES = [*cases.DTYPES]
# Every scale after itself and after three or four others.
PAIRS = [*itertools.product(SCALES, SCALES)][::2]


def check(first, second, shape, ranks=2, seed=0):
    fmt = Format.parse(first)
    dtype = cases.DTYPES[DTYPES[seed % 3]]
    tensors = [cases.tensor(shape, dtype, fmt.block, seed + rank) for rank in range(ranks)]
    cases.check_decode_sum_encode(fmt, cases.encoded(fmt, tensors), shape, Format.parse(second))


@pytest.mark.parametrize("codec", cases.PRESETS)
def test_shapes(codec):
    for turn, shape in cases.turns(codec, 0):
        check(codec, codec, shape, ranks=1 + turn % 2, seed=turn)


@pytest.mark.parametrize("codec", [codec for codec in cases.MIXED if codec not in cases.PRESETS])
def test_options(codec):
    check(codec, codec, (2, 2048 + 8))


@pytest.mark.parametrize("pair", PAIRS, ids=">".join)
def test_two_codecs(pair):
    """Elements, blocks and options of their own, and shapes that fit one or both."""
    turn = PAIRS.index(pair)
    flags = ["", "asym", "hadamard", "spike"]
    first, second = (
        cases.name(f"int{2 + (turn + 3 * i) % 7}", 8 << (turn + 2 * i) % 6, scale, flags[(turn + i) % 4])
        for i, scale in enumerate(pair)
    )
    check(first, second, [(2, 512), (2, 513), (2, 328)][turn % 3], ranks=1 + turn % 3, seed=turn)


@pytest.mark.parametrize("ranks", [4, 5])
@pytest.mark.parametrize("pair", ["mxfp4>mxfp8", "int4:32:fp16>int8:32:fp16", "nvfp4>nvfp4"])
def test_any_number_of_ranks(pair, ranks):
    """Fewer: test_two_codecs."""
    check(*pair.split(">"), (2, 999), ranks, seed=4)


@pytest.mark.parametrize("second", ["int8:32:fp16", "lloyd4:64:e5m3", "int4:64:fp16:hadamard"])
def test_sums_that_cancel(second):
    """Levels have no zero: behind a row's end they decode to something, which no scale of the sum may serve."""
    first, shape = Format.parse("lloyd4:32:e5m3"), (4, 3 * 32 + 5)
    x = cases.tensor(shape, torch.float32, 32)
    x = torch.where(x.isfinite(), x, 1.0)
    cases.check_decode_sum_encode(first, cases.encoded(first, [x, -x]), shape, Format.parse(second))
