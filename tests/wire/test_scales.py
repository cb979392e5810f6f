# SPDX-License-Identifier: Apache-2.0
"""Block maxima become the scale codes that the contracts state; values near the ends of each scale's range."""

import itertools

import numpy as np
import oracles
import pytest
import torch

from megatron_comp.wire.codec import Codec
from megatron_comp.wire.formats import ELEMENTS, SCALES, Minifloat
from megatron_comp.wire.scales import minifloat_codes

FLOATS = [element for element in ELEMENTS.values() if isinstance(element, Minifloat)]
FLOATS += [SCALES["e5m3"].float]


def ends(codec):
    """Block maxima at powers of two, at ties of `even`, at the element's largest value, and just beside all these."""
    top = oracles.largest(codec.split(":")[0])
    exponents = np.concatenate([np.arange(-126, -90), np.arange(-32, 34), np.arange(90, 128)])
    bases = np.concatenate([2 - 2.0 ** -np.arange(8), [1.25, top / 2.0 ** np.floor(np.log2(top))]])
    values = (bases[:, None] * 2.0**exponents).ravel()
    values = values[(values >= oracles.SMALLEST_NORMAL) & (values <= 3.4e38)].astype(np.float32)
    values = np.concatenate([values, np.nextafter(values, np.float32(np.inf)), np.nextafter(values, np.float32(0))])
    return np.concatenate([values, np.float32([0, oracles.BF16_MAX, 3.4028235e38, np.nan, np.inf])])


def scaled_by(maxima, codec):
    """The fields of a message of one block a row, whose maxima these are."""
    x = torch.zeros(len(maxima), 8)
    x[:, 3] = -torch.from_numpy(maxima)
    x[:, 5] = torch.from_numpy(maxima) / 3
    return x, oracles.read(Codec.parse(codec).encode(x), codec, *x.shape)


@pytest.mark.parametrize("fmt", FLOATS, ids=lambda fmt: fmt.name)
def test_nearest_code(fmt):
    """Every tie, its two neighbours in fp32, all values, what lies beyond the largest, and a sweep of magnitudes."""
    table = np.array(fmt.table[: fmt.max_code + 1])
    assert (np.diff(table) > 0).all()
    middles = ((table[1:] + table[:-1]) / 2).astype(np.float32)
    beyond = np.float32(fmt.max_value) * np.float32([1.001, 1.1, 2, 1e4, 1e30 / fmt.max_value])
    points = np.concatenate([table.astype(np.float32), middles, np.geomspace(1e-30, 1e30, 4001).astype(np.float32)])
    points = np.concatenate(
        [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0)), beyond]
    )
    codes = minifloat_codes(torch.from_numpy(points), fmt).numpy()
    np.testing.assert_array_equal(codes, oracles.nearest_even(table, points))
    assert (codes[-len(beyond) :] == fmt.max_code).all()


@pytest.mark.parametrize("element, scale", oracles.ELEMENTS_WITH_SCALES)
def test_scale_and_payload_over_the_whole_range_of_fp32(element, scale):
    """All rounding rules; scale codes and elements equal an independent computation, decoded values too."""
    for rule in oracles.rules(scale):
        codec = oracles.name(element, 8, scale, rule)
        x, fields = scaled_by(ends(codec), codec)
        expected = oracles.encode(x.numpy(), codec)
        assert fields.keys() == expected.keys()
        for field in fields:
            np.testing.assert_array_equal(fields[field], expected[field], err_msg=f"{codec} {field}")
        decoded = Codec.parse(codec).decode(Codec.parse(codec).encode(x), x.shape, torch.float32)
        np.testing.assert_array_equal(decoded.numpy(), oracles.decode(fields, codec))


@pytest.mark.parametrize(
    "rule, amax, exponent",
    [
        ("floor", 4.0, 0),
        ("floor", 7.99, 0),
        ("floor", 8.0, 1),
        ("even", 6.99, 0),
        ("even", 7.0, 1),  # halfway between the fp4 numbers 6 and 8: to the even one
        ("ceil", 3.0, -1),
        ("ceil", 3.01, 0),
        ("ceil", 6.0, 0),
        ("ceil", 6.01, 1),
    ],
)
@pytest.mark.parametrize("scale, bias", [("e8m0", 127), ("e5m0", 20)])
def test_rounding_rules_literally(rule, amax, exponent, scale, bias):
    _, fields = scaled_by(np.float32([amax]), f"fp4_e2m1:8:{scale}:{rule}")
    assert fields["scale"].item() == exponent + bias


@pytest.mark.parametrize("element", oracles.WITH_ZERO)
@pytest.mark.parametrize("scale", oracles.POWERS_OF_TWO)
def test_ceil_is_the_smallest_power_that_does_not_saturate(element, scale):
    maxima = np.float32(np.random.default_rng(0).uniform(1, 2, 2000) * 2.0 ** np.arange(-4, 4).repeat(250))
    _, fields = scaled_by(maxima, f"{element}:8:{scale}:ceil")
    scales = oracles.scale_table(scale)[fields["scale"][:, 0]]
    assert (maxima <= scales * oracles.largest(element)).all()
    assert (maxima > scales / 2 * oracles.largest(element)).all()


@pytest.mark.parametrize("element, scale", oracles.with_scales("e5m0", "e5m3", "fp16"))
def test_scales_of_small_range_saturate(element, scale):
    """Beyond the largest scale, values saturate with it: 1e30 decodes to the largest value there is."""
    codec = Codec.parse(f"{element}:8:{scale}")
    largest = {"e5m0": 1024.0, "e5m3": 114688.0, "fp16": 65504.0}[scale] * oracles.largest(element)
    x = torch.tensor([[1e30, -1e30, 0, 1e29, 1e38, 0, 0, -1]])
    y = codec.decode(codec.encode(x), x.shape, torch.float32)
    np.testing.assert_array_equal(y[0, [0, 1, 3, 4]].numpy(), np.float32([largest, -largest, largest, largest]))


@pytest.mark.parametrize("element, scale", oracles.with_scales("e5m0", "e5m3", "fp16"))
def test_blocks_below_the_smallest_scale_are_zeros(element, scale):
    smallest = {"e5m0": 2.0**-20, "e5m3": 2.0**-17, "fp16": 2.0**-24}[scale]
    codec = Codec.parse(f"{element}:8:{scale}")
    x = torch.tensor([[0.3, -0.3, 1, -1, 0, -0.0, 0.7, -0.1]]) * (smallest * oracles.largest(element) * 0.49)
    assert not codec.decode(codec.encode(x), x.shape, torch.float32).any()


@pytest.mark.parametrize("element, scale", oracles.with_scales("e8m0", "e4m3", "bf16", "fp32"))
@pytest.mark.parametrize("magnitude", [1e-30, 1e30, oracles.BF16_MAX], ids=["1e-30", "1e30", "bf16max"])
def test_scales_that_reach_everywhere(element, scale, magnitude):
    """The block maximum keeps its magnitude: within the element's saturation under `floor`, and a scale's rounding."""
    for rule, dtype in itertools.product(oracles.rules(scale), (torch.float32, torch.bfloat16)):
        codec = Codec.parse(oracles.name(element, 8, scale, rule))
        x = torch.tensor([[1, -1, 0, 0.5, 0.25, 0, -0.75, 1]], dtype=torch.float64).mul(magnitude).to(dtype)
        y = codec.decode(codec.encode(x), x.shape, dtype)
        assert y.isfinite().all()
        ratio = y[0, 0].double() / x[0, 0].double()
        top = oracles.largest(element)
        lowest = top / 2 ** (1 + np.floor(np.log2(top))) if scale == "e8m0" else 1 - 2**-4
        assert lowest * (1 - 2**-8) <= ratio <= 1.6, (str(codec), dtype)
        assert y[0, 1] == -y[0, 0]


@pytest.mark.parametrize("element", oracles.ELEMENTS)
def test_row_scale_brings_the_largest_block_to_the_top_of_e4m3(element):
    """NVFP4's second level, by row: a row 2^40 times as large has the same codes and 2^40 times the row scale."""
    codec = f"{element}:16:e4m3"
    x = oracles.random_tensor((4, 64), seed=1)
    fields = oracles.read(Codec.parse(codec).encode(torch.cat([x, x * 2.0**40])), codec, 8, 64)
    assert (fields["scale"].max(axis=1) == 126).all()
    for field in ("payload", "scale"):
        np.testing.assert_array_equal(fields[field][:4], fields[field][4:])
    row_scales = fields["row_scale"].astype(np.uint32).view(np.float32)
    np.testing.assert_array_equal(row_scales[4:], row_scales[:4] * np.float32(2.0**40))
    np.testing.assert_allclose(row_scales[:4, 0], x.abs().amax(1) / (448 * oracles.largest(element)), rtol=1e-6)
