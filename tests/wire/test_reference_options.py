# SPDX-License-Identifier: Apache-2.0
"""The reference codec, option by option."""

import numpy as np
import oracles
import pytest
import torch

from megatron_comp.wire import reference
from megatron_comp.wire.codec import Codec
from megatron_comp.wire.formats import Format


def squared_error(x, codec):
    """fp64 by block of 32 and row."""
    codec = Codec.parse(codec)
    y = codec.decode(codec.encode(x), x.shape, torch.float32)
    return (y.double() - x.double()).square().unflatten(-1, (-1, 32)).sum(-1)


def hadamard_matrix(size):
    """By its definition: (-1)^(number of ones that row and column have in common) / sqrt(size)."""
    ones = np.array([[bin(i & j).count("1") for j in range(size)] for i in range(size)])
    return (-1.0) ** ones / np.sqrt(size)


@pytest.mark.parametrize("block", oracles.BLOCKS)
@pytest.mark.parametrize("tail", [0, 1, 5])
def test_hadamard_is_the_matrix_and_its_own_inverse(block, tail):
    x = oracles.random_tensor((7, 3 * block + tail), seed=4)
    y = reference._transform(x, Format.parse(f"int8:{block}:fp32:hadamard"))
    whole = x[:, : 3 * block].double().numpy().reshape(7, 3, block)
    expected = whole @ hadamard_matrix(block)
    tolerance = 2**-22 * np.abs(whole).max() * np.sqrt(block)
    np.testing.assert_allclose(y[:, :3].double().numpy(), expected, rtol=0, atol=tolerance)
    back = reference._hadamard(y, x.shape[1]).flatten(1)[:, : x.shape[1]]
    np.testing.assert_allclose(back.numpy(), x.numpy(), rtol=0, atol=tolerance)
    assert torch.equal(back[:, 3 * block :], x[:, 3 * block :]), "a short block stays"


def test_hadamard_additions_have_one_order():
    """Neighbours first, then pairs of pairs, one product at the end: every backend must round like this."""
    x = oracles.random_tensor((64, 8), seed=5).numpy()
    y = x
    for distance in (1, 2, 4):
        new = np.empty_like(y)
        for i in range(8):
            partner = i ^ distance
            new[:, i] = y[:, i] + y[:, partner] if i < partner else y[:, partner] - y[:, i]
        y = new
    expected = y * np.float32(8**-0.5)
    np.testing.assert_array_equal(
        reference._transform(torch.from_numpy(x), Format.parse("int8:8:fp32:hadamard"))[:, 0].numpy(), expected
    )


@pytest.mark.parametrize("element", ["fp4_e2m1", "int4", "int3"])
@pytest.mark.parametrize("block", [32, 128])
def test_hadamard_helps_blocks_with_an_outlier(element, block):
    x = oracles.random_tensor((256, 256), seed=6, spread=0)
    x[:, ::block] = 10
    plain = squared_error(x, f"{element}:{block}:fp16").sum()
    assert squared_error(x, f"{element}:{block}:fp16:hadamard").sum() < 0.8 * plain


@pytest.mark.parametrize("element, scale", oracles.ELEMENTS_WITH_SCALES)
def test_search_never_errs_more_and_on_average_less(element, scale, record_property):
    """By block of 32 against the plain scale, also with asym and spike. Run with -s to see the gain."""
    x = oracles.random_tensor((512, 256), seed=7)
    gains = []
    for others in [set_ for set_ in oracles.flag_sets(element) if not {"search", "hadamard"} & set(set_)]:
        plain = squared_error(x, oracles.name(element, 32, scale, *others))
        searched = squared_error(x, oracles.name(element, 32, scale, *others, "search"))
        assert (searched <= plain * (1 + 1e-5)).all()
        gains.append(10 * torch.log10(plain.sum() / searched.sum()).item())
    print(f"search saves {', '.join(f'{gain:.2f}' for gain in gains)} dB with {element}:32:{scale}")
    assert all(gain > 0 for gain in gains)


@pytest.mark.parametrize("bits, less", [(2, 0.5), (3, 0.28), (4, 0.24), (5, 0.16)])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("search", ["", ":search"])
def test_levels_err_less_than_integers(bits, less, block, search):
    """On normal values, for which they were found."""
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(9))
    levels, integers = (
        squared_error(x, f"{element}:{block}:e5m3{search}").sum() for element in (f"lloyd{bits}", f"int{bits}")
    )
    assert levels < (1 - less) * integers


@pytest.mark.parametrize("element", oracles.LEVELS)
def test_what_fills_a_block_up_has_no_say_in_the_search(element):
    """A row that ends amid a block decodes as the whole block would that ends in more of the same values."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(10))
    codec = Codec.parse(f"{element}:32:e5m3:search")
    short, whole = (codec.decode(codec.encode(y), y.shape, torch.float32) for y in (x, x.repeat(1, 2)))
    assert torch.equal(short, whole[:, :16])


@pytest.mark.parametrize("element", oracles.INTEGERS)
@pytest.mark.parametrize("scale", oracles.SCALES)
def test_asym_helps_blocks_off_centre(element, scale):
    """All values in 3 .. 4: the zero point takes the 3.5 away. A short last block counts its own values only."""
    x = torch.rand(64, 80, generator=torch.Generator().manual_seed(8)) + 3
    codecs = [Codec.parse(oracles.name(element, 32, scale, *options)) for options in ([], ["asym"])]
    errors = [(c.decode(c.encode(x), x.shape, torch.float32) - x).square() for c in codecs]
    assert errors[1].sum() < 0.6 * errors[0].sum()
    assert errors[1][:, 64:].sum() < 0.6 * errors[0][:, 64:].sum()


@pytest.mark.parametrize("element", ["int2", "int4", "int8"])
def test_asym_uses_all_codes_from_the_minimum_to_the_maximum(element):
    codec = f"{element}:256:fp32:asym"
    half = 2 ** (oracles.INTEGERS[element] - 1)
    x = torch.linspace(100, 300, 256).view(1, 256)
    fields = oracles.read(Codec.parse(codec).encode(x), codec, 1, 256)
    payload = oracles.element_table(element)[fields["payload"][0]]
    # The zero point is rounded to bf16, so one of the ends may fall short of its code.
    assert (payload[0], payload[-1]) in {(-half, half - 1), (-half + 1, half - 1), (-half, half - 2)}
    assert (np.diff(payload) >= 0).all()


def test_asym_of_a_constant_block_is_exact_up_to_bf16():
    codec = Codec.parse("int4:32:fp16:asym")
    x = torch.tensor([[3.140625] * 32 + [-1000.0] * 7])
    assert torch.equal(codec.decode(codec.encode(x), x.shape, torch.float32), x)


@pytest.mark.parametrize("element", oracles.INTEGERS)
@pytest.mark.parametrize("options", [["spike"], ["asym", "spike"], ["search", "spike"]], ids=":".join)
@pytest.mark.parametrize("block", [8, 256])
def test_spike_keeps_the_ends_of_each_block(element, options, block):
    """Minimum and maximum exactly as bf16, the first of equals, in whole blocks and in the short last one."""
    codec = Codec.parse(oracles.name(element, block, "fp16", *options))
    x = oracles.random_tensor((16, 2 * block + 3), seed=9)
    x[3, :block] = 1.0  # all alike
    x[4, 2 * block :] = torch.tensor([2.0, 2.0, -7.0])
    fields = oracles.read(codec.encode(x), str(codec), *x.shape)
    places = torch.from_numpy(fields["spike_index"]).view(16, 3, 2)
    y = codec.decode(codec.encode(x), x.shape, torch.float32)
    for number, (part, decoded) in enumerate(zip(x.split(block, 1), y.split(block, 1), strict=True)):
        for end, find in enumerate((torch.argmin, torch.argmax)):
            place = find(part, dim=1, keepdim=True)
            assert torch.equal(places[:, number, end : end + 1], place)
            assert torch.equal(decoded.gather(1, place), part.gather(1, place).bfloat16().float())


@pytest.mark.parametrize("element", ["int2", "int4", "int5"])
@pytest.mark.parametrize("others", [[], ["asym"], ["search"]], ids=["plain", "asym", "search"])
def test_spike_helps_blocks_with_outliers(element, others):
    x = oracles.random_tensor((256, 256), seed=10, spread=0)
    x[:, 5::32], x[:, 20::32] = 30, -50
    plain = squared_error(x, oracles.name(element, 32, "fp16", *others)).sum()
    assert squared_error(x, oracles.name(element, 32, "fp16", *others, "spike")).sum() < 0.25 * plain


@pytest.mark.parametrize("element", oracles.INTEGERS)
def test_spike_leaves_the_rest_to_a_scale_of_their_own(element):
    codec = f"{element}:8:fp32:spike"
    x = torch.tensor([[1e6, 0.5, -1.0, 0.25, -1e6, 0.75, 0, 0.1]])
    fields = oracles.read(Codec.parse(codec).encode(x), codec, 1, 8)
    scale = fields["scale"].astype(np.uint32).view(np.float32).item()
    assert scale == np.float32(1.0) / np.float32(oracles.largest(element))
    assert fields["payload"][0, 0] == fields["payload"][0, 4] == 0
