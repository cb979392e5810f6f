"""The reference codec against other people's code (ml_dtypes, torchao), on corner blocks, and option by option."""

import itertools

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


def squared_error(x, codec):
    """fp64 by block of 32 and row."""
    codec = Codec.parse(codec)
    y = codec.decode(codec.encode(x), x.shape, torch.float32)
    return (y.double() - x.double()).square().unflatten(-1, (-1, 32)).sum(-1)


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
    codec, count = f"{element}:256:e8m0", 2 ** oracles.element_bits(element)
    fields = {"payload": np.tile(np.arange(count), (2, 1)), "scale": np.array([[127], [124]])}
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


# Corner blocks of every codec.

NAN, INF, FP32_MAX = float("nan"), float("inf"), float(np.finfo(np.float32).max)
# What one block holds (repeated to its length): these decode to NaN in every place.
BAD = [[NAN], [1, NAN, 2, 3], [0, 0, 0, INF], [1, 2, -INF, 3], [INF, -INF, NAN], [-NAN, 1e30], [INF]]
# These stay finite.
FINITE = [
    *([1e30], [-1e30], [1e30, 1, -2], [1e30, -1e30, 1e-30], [1e-30], [-1e-30, 1e-30], [1e-30, 1e-38]),
    *([oracles.BF16_MAX], [-oracles.BF16_MAX], [oracles.BF16_MAX, -oracles.BF16_MAX], [oracles.BF16_MAX, 0, 0]),
    *([1, -oracles.BF16_MAX], [oracles.BF16_MAX, 1e-30], [FP32_MAX], [-FP32_MAX, FP32_MAX], [65504]),
    *([65504, -65504], [2.0**-126], [2.0**-126, -(2.0**-125)], [2.0**-24], [1.0], [-5, 2.0**-126]),
]
# These decode to zeros, of their own sign in minifloats.
ZERO = [[0.0], [-0.0], [0.0, -0.0], [1e-39], [-1e-39, 0], [2.0**-127, -(2.0**-130)]]
CORNERS = BAD + FINITE + ZERO


def corner_rows(block, dtype):
    """A row for each corner twice: in its second block of four, and in its last, short one."""
    width = 3 * block + block // 2 + 1
    x = oracles.random_tensor((2 * len(CORNERS), width), seed=3)
    mask = torch.zeros(x.shape, dtype=torch.bool)
    limit = {torch.float32: FP32_MAX, torch.bfloat16: oracles.BF16_MAX, torch.float16: 65504.0}[dtype]
    for row, values in enumerate(CORNERS + CORNERS):
        where = slice(block, 2 * block) if row < len(CORNERS) else slice(3 * block, width)
        length = where.stop - where.start
        filled = torch.tensor(values, dtype=torch.float32).repeat(-(-length // len(values)))[:length]
        x[row, where] = torch.where(filled.isfinite(), filled.clamp(-limit, limit), filled)
        mask[row, where] = True
    return x.to(dtype), mask


def check_corners(name):
    codec, element = Codec.parse(name), name.split(":")[0]
    count = len(CORNERS)
    kinds = torch.arange(2 * count) % count
    bad = kinds < len(BAD)
    zero = kinds >= len(BAD) + len(FINITE)
    for dtype, outputs in {
        torch.float32: [torch.float32, torch.bfloat16, torch.float16],
        torch.bfloat16: [torch.bfloat16, torch.float16],
        torch.float16: [torch.float16],
    }.items():
        x, mask = corner_rows(codec.format.block, dtype)
        message = codec.encode(x)
        calm = codec.encode(x.masked_fill(mask & bad[:, None], 0.0))
        for output in outputs:
            where = f"{name} {dtype} -> {output}"
            y = codec.decode(message, x.shape, output)
            assert torch.equal(y.isnan(), mask & bad[:, None]), where
            assert not y.isinf().any(), where
            others = codec.decode(calm, x.shape, output)
            assert oracles.same_bits(y.masked_fill(mask, 0), others.masked_fill(mask, 0)), where
            zeros = mask & zero[:, None]
            assert not y[zeros].any(), where
            if element in oracles.MINIFLOATS and "hadamard" not in name:
                assert torch.equal(y[zeros].signbit(), x[zeros].signbit()), where
                small = (y == 0) & ~mask
                assert torch.equal(y[small].signbit(), x[small].signbit()), where


@pytest.mark.parametrize("element", oracles.ELEMENTS)
@pytest.mark.parametrize("scale", oracles.SCALES)
def test_corners_of_every_element_block_and_scale(element, scale):
    """NaN and infinity spoil their block and no other; finite blocks stay finite; zeros stay zeros; -0 stays -0."""
    for block in oracles.BLOCKS:
        check_corners(oracles.name(element, block, scale))


@pytest.mark.parametrize("element", oracles.ELEMENTS)
@pytest.mark.parametrize("scale", oracles.SCALES)
def test_corners_of_every_set_of_options(element, scale):
    """All rules with all sets of flags; the block size goes around."""
    blocks = itertools.cycle(oracles.BLOCKS)
    for rule, flags in itertools.product(oracles.rules(scale), oracles.flag_sets(element)):
        check_corners(oracles.name(element, next(blocks), scale, rule, *flags))


@pytest.mark.parametrize("name", oracles.PRESETS)
def test_corners_of_presets(name):
    check_corners(str(Codec.parse(name)))


# Options.


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


@pytest.mark.parametrize("element", oracles.ELEMENTS)
@pytest.mark.parametrize("scale", oracles.SCALES)
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
