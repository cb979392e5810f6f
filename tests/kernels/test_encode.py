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


@pytest.mark.parametrize("codec", cases.PLAIN)
def test_every_element_with_every_scale(codec):
    turn = cases.PLAIN.index(codec)
    check(codec, (2, 3000 + turn), DTYPES[turn % 3], turn)


@pytest.mark.parametrize("codec", cases.OPTIONS)
def test_every_set_of_options_with_every_scale(codec):
    turn = cases.OPTIONS.index(codec)
    check(codec, (2, 3000 + turn), DTYPES[turn % 3], turn)


@pytest.mark.parametrize("codec", cases.MIXED)
def test_every_shape(codec):
    for turn, shape in enumerate(cases.shapes(Format.parse(codec)).values()):
        check(codec, shape, DTYPES[turn % 3], turn)


def test_shapes_take_every_way():
    """Rows taken for one or not, and aligned to whole vectors, words and bytes; several tiles in one row, too."""
    formats = [Format.parse(codec) for codec in cases.MIXED]
    ways = [(*cases.path(fmt, shape), fmt, shape) for fmt in formats for shape in cases.shapes(fmt).values()]
    assert {way[:2] for way in ways} == {(True, 16), (False, 16), (False, 4), (False, 1)}
    several = {fmt.scale.row_scaled for flat, _, fmt, shape in ways if not flat and shape[1] > TILE}
    assert several == {True, False}


@pytest.mark.parametrize("codec", ["mxfp6", "nvfp4", "int4:32:fp16"])
def test_many_rows(codec):
    check(codec, (40, 72), "bf16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", ["mxfp4", "mxfp8", "nvfp4", "flash-int4", "int4:32:fp16:hadamard"])
def test_every_type(codec, dtype):
    check(codec, (4, 2048 + 8), dtype, seed=1)


@pytest.mark.parametrize("codec", ["mxfp4", "nvfp4", "int3:8:fp32:hadamard:spike"])
@pytest.mark.parametrize(
    "view",
    {
        "transposed": lambda x: x.t(),
        "every second column": lambda x: x[:, ::2],
        "columns cut out": lambda x: x[:, 3:35],
        "columns cut out on 16 bytes": lambda x: x[:, 8:40],
        "every third row": lambda x: x[::3],
        "one row repeated": lambda x: x[:1].expand(3, -1),
        "one column": lambda x: x[:1].t(),
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
