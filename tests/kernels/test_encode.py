# SPDX-License-Identifier: Apache-2.0
"""Partial sums to messages: the reference's bytes, for every stage, on every way through the kernel."""

import kernel_cases as cases
import pytest
import torch

from megatron_comp.kernels.format import TILE
from megatron_comp.wire.formats import Format

DTYPES = [*cases.DTYPES]


def check(codec, shape, dtype, seed=0):
    fmt = Format.parse(codec)
    cases.check_encode(fmt, cases.tensor(shape, cases.DTYPES[dtype], fmt.block, seed).to(cases.DEVICE))


@pytest.mark.parametrize("codec", cases.TO_ENCODE)
def test_elements_scales_and_options(codec):
    turn = cases.TO_ENCODE.index(codec)
    check(codec, cases.flat_or_ragged(Format.parse(codec), turn), DTYPES[turn % 3], turn)


@pytest.mark.parametrize("codec", cases.MIXED)
def test_shapes(codec):
    for turn, shape in cases.turns(codec, 0):
        check(codec, shape, DTYPES[turn % 3], turn)


@pytest.mark.parametrize("kernel", [0, 1])
def test_shapes_take_every_way(kernel):
    """Rows taken for one or not, and aligned to whole vectors, words and bytes; several tiles in one row, too."""
    formats = {Format.parse(codec): cases.turns(codec, kernel) for codec in cases.MIXED}
    ways = [(*cases.path(fmt, shape), fmt, shape) for fmt, turns in formats.items() for _, shape in turns]
    assert {way[:2] for way in ways} == {(True, 16), (False, 16), (False, 4), (False, 1)}
    several = {fmt.scale.row_scaled for flat, _, fmt, shape in ways if not flat and shape[1] > TILE}
    assert several == {True, False}


@pytest.mark.parametrize("codec", ["mxfp6", "nvfp4", "int4:32:fp16"])
def test_many_rows(codec):
    check(codec, (6, 72), "bf16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", ["mxfp4", "mxfp8", "nvfp4", "flash-int4", "int4:32:fp16:hadamard"])
def test_every_type(codec, dtype):
    check(codec, (2, 2048 + 8), dtype, seed=1)


@pytest.mark.parametrize("codec", ["mxfp4", "nvfp4", "int3:8:fp32:hadamard:spike"])
@pytest.mark.parametrize(
    "view",
    {
        "transposed": lambda x: x[:, :6].t(),
        "every second column": lambda x: x[:, ::2],
        "columns cut out": lambda x: x[:, 3:35],
        "columns cut out on 16 bytes": lambda x: x[:, 8:40],
        "every third row": lambda x: x[::3],
        "one row repeated": lambda x: x[:1].expand(3, -1),
        "one column": lambda x: x[:1, :6].t(),
    }.items(),
    ids=lambda view: view[0],
)
def test_strided_input(codec, view):
    x = view[1](cases.tensor((5, 64), torch.bfloat16, 32, seed=2).to(cases.DEVICE))
    before = x.clone()
    cases.check_encode(Format.parse(codec), x)
    assert torch.equal(x.view(torch.int16), before.view(torch.int16))


@pytest.mark.parametrize("codec", ["mxfp4", "nvfp4", "int4:32:fp16:asym", "int5:8:bf16:hadamard:spike"])
def test_nothing_but_bad_blocks(codec):
    """A row of NaN and one of infinities: no need at all is left for a row's scale."""
    x = torch.full((2, 100), torch.nan)
    x[1] = -torch.inf
    cases.check_encode(Format.parse(codec), x.to(cases.DEVICE))


@pytest.mark.parametrize("element", ["lloyd2", "lloyd3", "lloyd4", "lloyd5"])
def test_what_fills_a_block_up_has_no_say_in_the_search(element):
    """Levels have no zero: what stands behind the end of a row would err by the smallest of them."""
    x = torch.randn(16, 37, generator=torch.Generator().manual_seed(0))
    cases.check_encode(Format.parse(f"{element}:32:e5m3:search"), x.to(cases.DEVICE))
