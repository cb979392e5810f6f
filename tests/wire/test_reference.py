# SPDX-License-Identifier: Apache-2.0
"""The reference codec against other people's code: ml_dtypes and torchao."""

import ml_dtypes
import numpy as np
import oracles
import pytest
import torch

from megatron_comp.wire import reference
from megatron_comp.wire.codec import Codec
from megatron_comp.wire.formats import Format

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ML_DTYPES = {
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
}
ML_INTEGERS = {"int2": ml_dtypes.int2, "int4": ml_dtypes.int4}


def dtype_id(dtype):
    return DTYPES[dtype]


def finite_bf16():
    """All 65,280 of them, as fp32."""
    values = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    values = values[np.isfinite(values)]
    assert len(values) == 65280
    return values


def cast(values, element):
    return reference._quantize(torch.from_numpy(values), Format.parse(f"{element}:32:fp32")).numpy()


# Elements.


@pytest.mark.parametrize("element", ML_DTYPES)
def test_casts_equal_ml_dtypes(element):
    values = finite_bf16()
    top = oracles.largest(element)
    theirs = np.clip(values, -top, top).astype(ML_DTYPES[element])
    codes = cast(values, element)
    np.testing.assert_array_equal(codes, theirs.view(np.uint8))
    np.testing.assert_array_equal(oracles.element_table(element)[codes], theirs.astype(np.float64))


@pytest.mark.parametrize("element", ML_INTEGERS)
def test_integer_casts_equal_ml_dtypes(element):
    """Which rounds toward zero itself, so numpy's half-to-even goes first."""
    values = finite_bf16()
    top = oracles.largest(element)
    theirs = np.rint(np.clip(values, -top, top)).astype(np.int8).astype(ML_INTEGERS[element])
    codes = cast(values, element)
    np.testing.assert_array_equal(oracles.element_table(element)[codes], theirs.astype(np.float64))


@pytest.mark.parametrize("element", oracles.ELEMENTS)
def test_casts_equal_a_search_for_the_nearest(element):
    """All finite bf16, and in fp32 every tie of the element's table with both its neighbours."""
    table = np.unique(oracles.element_table(element)[np.isfinite(oracles.element_table(element))])
    ties = ((table[1:] + table[:-1]) / 2).astype(np.float32)
    values = np.concatenate(
        [finite_bf16(), ties, np.nextafter(ties, np.float32(9e9)), np.nextafter(ties, -np.float32(9e9))]
    )
    np.testing.assert_array_equal(cast(values, element), oracles.element_codes(element, values))


@pytest.mark.parametrize("element", oracles.ELEMENTS)
def test_every_code_decodes_to_its_value(element):
    """Through a whole message: all 2^b codes in one row, under scales 1 and 2^-3."""
    codec, count = f"{element}:256:e5m3", 2 ** oracles.element_bits(element)
    fields = {"payload": np.tile(np.arange(count), (2, 1)), "scale": np.array([[0b01111_000], [0b01100_000]])}
    message = oracles.write(fields, codec, 2, count)
    for dtype in DTYPES:
        values = oracles.element_table(element)
        if dtype == torch.float16:  # +-infinity, which encoding never sends
            values = np.clip(values, -65504, 65504)
        y = Codec.parse(codec).decode(message, (2, count), dtype)
        np.testing.assert_array_equal(y[0].double().numpy(), values)
        np.testing.assert_array_equal(
            y[1].double().numpy(),
            np.clip(oracles.element_table(element) / 8, -65504, 65504) if dtype == torch.float16 else values / 8,
        )


# Blocks against torchao.


def torchao_mx(x, element, mode):
    """(scale codes, element codes) of torchao's MX cast of `[rows, 32]`."""
    from torchao.prototype.mx_formats import constants, mx_tensor

    dtype = {
        "fp4_e2m1": torch.float4_e2m1fn_x2,
        "fp6_e2m3": constants.DTYPE_FP6_E2M3,
        "fp6_e3m2": constants.DTYPE_FP6_E3M2,
        "fp8_e4m3": torch.float8_e4m3fn,
        "fp8_e5m2": torch.float8_e5m2,
    }[element]
    scales, data = mx_tensor.to_mx(x, dtype, 32, mx_tensor.ScaleCalculationMode[mode])
    codes = data.view(torch.uint8)
    if element == "fp4_e2m1":
        codes = torch.stack([codes & 15, codes >> 4], dim=-1)
    return scales.view(torch.uint8).reshape(-1, 1).numpy(), codes.reshape(x.shape).numpy()


def our_mx(x, element, rule):
    codec = f"{element}:32:e8m0:{rule}"
    return oracles.read(Codec.parse(codec).encode(x), codec, *x.shape)


# torchao's RCEIL is the smallest power of two that is at least amax / max. Its CEIL, ceil(log2 amax) - emax, takes
# twice that for a maximum such as 5 in fp4, so it is not ours.
@pytest.mark.parametrize("rule, mode", [("floor", "FLOOR"), ("even", "EVEN"), ("ceil", "RCEIL")])
@pytest.mark.parametrize("element", ML_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_blocks_equal_torchao(element, rule, mode, dtype):
    """8,192 blocks: magnitudes 2^-100 .. 2^100, within a block alike, mixed, or with an outlier."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.randint(-100, 101, (8192, 1), generator=generator).float().exp2()
    x = torch.randn(8192, 32, generator=generator)
    x[2048:4096] *= (torch.rand(2048, 32, generator=generator) * 16 - 8).exp2()
    x[4096:6144, 7] *= 50
    x[6144:] = torch.randint(-128, 129, (2048, 32), generator=generator) / 64  # many ties
    x = (x * scale).to(dtype)
    fields = our_mx(x, element, rule)
    scales, codes = torchao_mx(x, element, mode)
    np.testing.assert_array_equal(fields["scale"], scales)
    np.testing.assert_array_equal(fields["payload"], codes)


def test_torchao_ceil_is_another_rule():
    x = torch.full((1, 32), 5.0)
    assert our_mx(x, "fp4_e2m1", "ceil")["scale"].item() == 127
    assert torchao_mx(x, "fp4_e2m1", "RCEIL")[0].item() == 127
    assert torchao_mx(x, "fp4_e2m1", "CEIL")[0].item() == 128


def test_where_torchao_takes_a_logarithm_we_take_bits():
    """The least above 6 * 2^20 needs 2^21 in fp4. A logarithm in fp32 cannot tell it from 6 * 2^20, so it saturates."""
    x = torch.full((1, 32), float(np.nextafter(np.float32(6 * 2.0**20), np.float32(np.inf))))
    assert our_mx(x, "fp4_e2m1", "ceil")["scale"].item() == 127 + 21
    assert torchao_mx(x, "fp4_e2m1", "RCEIL")[0].item() == 127 + 20


def test_integers_are_not_torchaos_but_have_the_same_rules():
    """A power-of-two scale of int8 under each rule, by hand: 127 is its largest, 7 bits wide."""
    x = torch.zeros(1, 32)
    for amax, exponents in {127.0: (0, 0, 0), 127.4: (0, 0, 1), 127.6: (0, 1, 1), 128.0: (1, 1, 1)}.items():
        x[0, 5] = -amax
        found = tuple(our_mx(x, "int8", rule)["scale"].item() - 127 for rule in ("floor", "even", "ceil"))
        assert found == exponents


# Blocks where other people's code disagrees, as our contract has it.


@pytest.mark.parametrize(
    "block, rule, scale, first",
    [
        ([0.0], "floor", 0, 0.0),
        ([-0.0], "ceil", 0, -0.0),
        ([7.0, 1], "floor", 127, 6.0),
        ([7.0, 1], "even", 128, 8.0),
        ([7.0, 1], "ceil", 128, 8.0),
        ([6.1, 1], "floor", 127, 6.0),
        ([6.1, 1], "even", 127, 6.0),
        ([6.1, 1], "ceil", 128, 6.0),
        ([1e30, 1e30], "floor", 224, 6 * 2.0**97),
        ([1e30, 1e30], "even", 224, 6 * 2.0**97),
        ([1e30, 1e30], "ceil", 225, 6 * 2.0**97),
        ([oracles.BF16_MAX], "floor", 252, 6 * 2.0**125),
        ([oracles.BF16_MAX], "even", 252, 6 * 2.0**125),  # torchao: infinity
        ([oracles.BF16_MAX], "ceil", 252, 6 * 2.0**125),  # torchao: infinity
        ([2.0**-127], "floor", 0, 0.0),  # torchao keeps it
        ([-(2.0**-127)], "floor", 0, -0.0),
        ([2.0**-126], "floor", 0, 2.0**-126),
        ([1.0, float("nan")], "floor", 255, float("nan")),
        ([1.0, float("inf")], "even", 255, float("nan")),  # torchao: [0, infinity]
        ([1.0, float("-inf")], "ceil", 255, float("nan")),
    ],
)
def test_documented_corners_of_mxfp4(block, rule, scale, first):
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, : len(block)] = torch.tensor(block)
    fields = our_mx(x, "fp4_e2m1", rule)
    assert fields["scale"].item() == scale
    codec = Codec.parse(f"fp4_e2m1:32:e8m0:{rule}")
    y = codec.decode(codec.encode(x), x.shape, torch.bfloat16)
    np.testing.assert_array_equal(y[0, 0].double().numpy(), first)
    if np.isnan(first):
        assert y.isnan().all()
    else:
        assert np.signbit(y[0, 0].double().numpy()) == np.signbit(first)
