# SPDX-License-Identifier: Apache-2.0
"""Messages to their sum: the reference's bits, in rank order and rounded once."""

import kernel_cases as cases
import pytest
import torch

from megatron_comp.wire import message
from megatron_comp.wire.formats import SCALES, Format

DTYPES = [*cases.DTYPES]
# Decoding knows nothing of the search that an encoder made.
CODECS = [codec for codec in cases.TO_DECODE if "search" not in codec]


def check(codec, shape, dtype, ranks=2, seed=0):
    fmt = Format.parse(codec)
    tensors = [cases.tensor(shape, cases.DTYPES[dtype], fmt.block, seed + rank) for rank in range(ranks)]
    cases.check_decode_sum(fmt, cases.encoded(fmt, tensors), shape, cases.DTYPES[dtype])


@pytest.mark.parametrize("codec", CODECS)
def test_elements_scales_and_options(codec):
    turn = CODECS.index(codec)
    check(codec, cases.flat_or_ragged(Format.parse(codec), turn), DTYPES[turn % 3], seed=turn)


@pytest.mark.parametrize("codec", cases.MIXED)
def test_shapes(codec):
    for turn, shape in cases.turns(codec, 1):
        check(codec, shape, DTYPES[turn % 3], ranks=1 + turn % 2, seed=turn)


@pytest.mark.parametrize("codec", ["mxfp6", "nvfp4", "int4:32:fp16"])
def test_many_rows(codec):
    check(codec, (6, 72), "bf16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", ["mxfp4", "mxfp8", "nvfp4", "flash-int4", "int4:32:fp16:hadamard"])
def test_every_type(codec, dtype):
    check(codec, (2, 2048 + 8), dtype, seed=1)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("options", ["", ":hadamard", ":asym"])
def test_damaged_scales(scale, options):
    """Messages of random bytes: whatever stands in the place of a scale, it means what the reference says."""
    fmt, shape = Format.parse(f"int4:8:{scale}{options}"), (2, 4096)
    nbytes = message.layout(fmt, *shape).nbytes
    generator = torch.Generator().manual_seed(nbytes)
    messages = torch.randint(0, 256, (2, nbytes), generator=generator, dtype=torch.uint8).to(cases.DEVICE)
    for ranks, dtype in ((1, torch.float32), (2, torch.bfloat16)):
        cases.check_decode_sum(fmt, messages[:ranks], shape, dtype)


@pytest.mark.parametrize("ranks", [3, 4, 5])
@pytest.mark.parametrize("codec", ["mxfp4", "int8:32:fp32", "int5:16:fp16:asym:spike"])
def test_any_number_of_ranks(codec, ranks):
    """Their numbers differ in size, so that the order of the additions shows in fp32. One and two: test_shapes."""
    check(codec, (2, 1999), "fp32", ranks, seed=3)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(
    "codec", ["fp4_e2m1:32:e8m0:ceil", "nvfp4", "int8:32:fp32:hadamard", "int4:32:bf16:asym:spike"]
)
def test_sums_beyond_half_precision(codec, ranks):
    """One message alone is cut to fp16's range, but for its NaN; a sum of several becomes infinite."""
    fmt, shape = Format.parse(codec), (2, 1999)
    tensors = [cases.tensor(shape, torch.float32, fmt.block, seed) for seed in range(ranks)]
    cases.check_decode_sum(fmt, cases.encoded(fmt, tensors), shape, torch.float16)
