# SPDX-License-Identifier: Apache-2.0
"""Properties of `Codec` over all formats: error bounds, rows on their own, any shape and strides."""

import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from megatron_comp.wire.codec import Codec, CodecPair, parse_codec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

codecs = st.sampled_from(oracles.all_codecs())
hiddens = st.sampled_from([1, 2, 7, 8, 9, 31, 33, 64, 100, 257, 600])


@st.composite
def tensors(draw, min_rows=0):
    """`[rows, hidden]` of three types, with magnitudes between rows and runs of a row near or far apart."""
    shape = draw(st.integers(min_rows, 5)), draw(hiddens)
    spread = draw(st.sampled_from([0.0, 2.0, 12.0]))
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    x = oracles.random_tensor(shape, seed=draw(st.integers(0, 10**6)), spread=spread)
    return (x * draw(st.sampled_from([1.0, 2.0**-9, 2.0**9]))).clamp(-65504, 65504).to(dtype)


@st.composite
def bit_patterns(draw):
    """Any fp32 or bf16 numbers whatever, NaN, infinities and subnormals too."""
    shape = draw(st.integers(1, 3)), draw(st.sampled_from([1, 8, 20, 40]))
    bits = draw(hnp.arrays(np.uint32, shape))
    return torch.from_numpy(bits.view(np.float32)).to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


def fields(x, codec):
    return oracles.read(Codec.parse(codec).encode(x), codec, *x.shape)


def round_trip(x, codec, dtype=None):
    codec = Codec.parse(codec)
    return codec.decode(codec.encode(x), x.shape, dtype or x.dtype)


# Values.


@oracles.FIXED
@given(tensors(), st.sampled_from([codec for codec in oracles.all_codecs() if "hadamard" not in codec]))
def test_each_value_becomes_the_nearest_that_its_block_can_say(x, codec):
    """No code under the scale (and zero point) that was sent is nearer; spikes are exact bf16."""
    element, _, scale, *options = codec.split(":")
    found = fields(x, codec)
    ours = round_trip(x, codec, torch.float32).numpy()
    np.testing.assert_array_equal(ours, oracles.decode(found, codec))
    x = x.double().numpy()
    table = oracles.element_table(element)
    if element in oracles.INTEGERS and "asym" not in options:
        table = table[table >= -oracles.largest(element)]
    scales, zeros = oracles.scales_and_zeros(found, codec)
    every = scales[..., None] * table[np.isfinite(table)] + zeros[..., None]
    allowed = np.abs(every - x[..., None]).min(-1)
    if scale == "e5m0":  # blocks below its range are zeros
        allowed = np.where((scales == 2.0**-20) & (ours == zeros), np.abs(x - zeros), allowed)
    if "spike" in options:
        places = oracles.spike_places(found, codec)
        np.put_along_axis(allowed, places, 2.0**-8 * np.abs(np.take_along_axis(x, places, axis=1)), axis=1)
    # The quotient that is rounded has an error of its own, a few fp32 roundings of the row's largest value.
    assert (np.abs(ours - x) <= allowed + 2.0**-20 * np.abs(x).max(axis=1, initial=0)[:, None]).all()


@pytest.mark.parametrize("element, scale", oracles.ELEMENTS_WITH_SCALES)
def test_error_bound(element, scale):
    """|decoded - x| against the block's largest value, stated from the format alone. Scales are inside their range."""
    top, emax = oracles.largest(element), math.floor(math.log2(oracles.largest(element)))
    gap = oracles.largest_gap(element)
    rounding = {"e5m3": 2**-4, "e4m3": 2**-4, "fp16": 2**-11, "bf16": 2**-8, "fp32": 2**-23}
    bounds = {
        "": max(1 - top / 2 ** (emax + 1), gap / 2 / 2**emax),  # the maximum saturates, or rounds
        "even": max(1 - top / 2 ** (emax + 1), gap / 2 / (2**emax - gap / 2)),  # or was rounded up to 2^emax
        "ceil": gap / top,  # the maximum lies above half the top
    }
    if scale not in oracles.POWERS_OF_TWO:
        bounds = {"": rounding[scale] + (1 + rounding[scale]) * gap / 2 / top}
    x = 32 * oracles.random_tensor((256, 64), seed=11, spread=1)
    largest = x.unflatten(1, (-1, 16)).abs().amax(-1).repeat_interleave(16, 1)
    for rule, bound in bounds.items():
        error = (round_trip(x, oracles.name(element, 16, scale, rule)) - x).abs()
        assert (error <= bound * (1 + 1e-5) * largest).all()
        assert (error > bound * 0.3 * largest).any(), "the bound says something"


@oracles.FIXED
@given(tensors(), st.sampled_from(oracles.POWER_OF_TWO_CODECS))
def test_again_gives_the_same(x, codec):
    """Decoded values survive a second time; under `floor` and `even` the second message is the first.

    Not under `ceil`: a maximum that was rounded down to half of the largest value takes the next lower scale, under
    which minifloats still have all the values of before, but integers (-31, -32 .. 31 of 63 codes) need not.
    """
    y = round_trip(x, codec, torch.float32)
    if not codec.endswith("ceil"):
        assert torch.equal(Codec.parse(codec).encode(y), Codec.parse(codec).encode(x))
    elif codec.startswith("fp"):
        assert oracles.same_bits(round_trip(y, codec), y)


@oracles.FIXED
@given(bit_patterns(), codecs)
def test_any_bits(x, codec):
    """NaN and infinity spoil their own block, nothing else becomes NaN, and nothing becomes infinite."""
    block = int(codec.split(":")[1])
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % block)).unflatten(1, (-1, block))
    bad = ~padded.isfinite().all(-1, keepdim=True).expand(padded.shape).flatten(1)[:, : x.shape[1]]
    for dtype in DTYPES.values():
        y = round_trip(x, codec, dtype)
        assert torch.equal(y.isnan(), bad)
        assert not y.isinf().any()


@oracles.FIXED
@given(tensors(), codecs)
def test_decoding_to_a_narrow_type_rounds_once(x, codec):
    y = round_trip(x, codec, torch.float32)
    assert oracles.same_bits(round_trip(x, codec, torch.bfloat16), y.bfloat16())
    assert oracles.same_bits(round_trip(x, codec, torch.float16), y.clamp(-65504, 65504).half())


# Rows and shapes.


def same_fields(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[field], b[field]) for field in a)


@oracles.FIXED
@given(tensors(min_rows=1), codecs, st.randoms(use_true_random=False))
def test_rows_are_independent(x, codec, random):
    """In every section a row's bytes are the same alone, among others and in any place."""
    order = [random.randrange(len(x)) for _ in range(7)]
    together = fields(x[order], codec)
    for place, row in enumerate(order):
        alone = fields(x[row : row + 1], codec)
        assert same_fields({field: codes[place : place + 1] for field, codes in together.items()}, alone)


@pytest.mark.parametrize(
    "codec", [*oracles.PRESETS, "int5:256:e4m3:asym:hadamard:search:spike", "fp3_e1m1:8:e5m3:search"]
)
@pytest.mark.parametrize("rows, hidden", [(40, 4096), (3, 70001)], ids=["many rows", "rows longer than a tile"])
def test_tensors_larger_than_a_tile(codec, rows, hidden):
    """The reference works in tiles of rows: the same bytes and sums as row by row."""
    codec = str(Codec.parse(codec))
    x = oracles.random_tensor((rows, hidden), torch.bfloat16, seed=12)
    whole = fields(x, codec)
    for row in {0, rows // 2, rows - 1}:
        alone = fields(x[row : row + 1], codec)
        assert same_fields({field: codes[row : row + 1] for field, codes in whole.items()}, alone)
        assert torch.equal(round_trip(x, codec)[row], round_trip(x[row], codec))


@oracles.FIXED
@given(tensors(min_rows=1), codecs)
def test_a_short_last_block_is_a_block_of_what_there_is(x, codec):
    """Cut anywhere at a multiple of the block: the tail alone gives the tail's bits."""
    block = int(codec.split(":")[1])
    if ":e4m3" in codec:
        codec = codec.replace(":e4m3", ":e5m3")  # a row scale depends on the whole row
    cut = (x.shape[1] - 1) // block * block
    whole, tail = round_trip(x, codec), round_trip(x[:, cut:], codec)
    assert oracles.same_bits(whole[:, cut:], tail)


@pytest.mark.parametrize("codec", [*oracles.PRESETS, "int3:8:fp32:hadamard:spike"])
@pytest.mark.parametrize(
    "view",
    {
        "transposed": lambda x: x.t(),
        "every second column": lambda x: x[:, ::2],
        "columns cut out": lambda x: x[:, 3:45],
        "every third row": lambda x: x[::3],
        "expanded": lambda x: x[:1].expand(5, -1),
        "3-D transposed": lambda x: x.view(2, 24, 48).transpose(0, 1),
        "backwards permuted": lambda x: x.view(2, 24, 48).permute(2, 0, 1),
    }.items(),
    ids=lambda view: view[0],
)
def test_strided_input(codec, view):
    x = view[1](oracles.random_tensor((48, 48), torch.bfloat16, seed=13))
    before = x.clone()
    assert not x.is_contiguous() or "row" in view[0]
    assert torch.equal(Codec.parse(codec).encode(x), Codec.parse(codec).encode(x.contiguous()))
    assert torch.equal(x, before)


@pytest.mark.parametrize("codec", oracles.PRESETS)
@pytest.mark.parametrize(
    "shape", [(33,), (1, 33), (7, 33), (2, 3, 33), (1, 1, 1, 33), (1, 7, 1), (2, 3, 4, 5, 64)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_shape(codec, shape, dtype):
    """Leading dimensions are rows; the type comes back."""
    codec, x = Codec.parse(codec), oracles.random_tensor(shape, DTYPES[dtype], seed=14)
    message = codec.encode(x)
    assert message.dtype == torch.uint8 and message.shape == (codec.message_bytes(shape),)
    assert torch.equal(message, codec.encode(x.reshape(-1, shape[-1])))
    y = codec.decode(message, shape, x.dtype)
    assert y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous()


@pytest.mark.parametrize("codec", oracles.PRESETS)
@pytest.mark.parametrize("shape", [(0, 576), (2, 0, 33), (0, 1), (0, 0, 8)], ids=str)
def test_empty_tensors(codec, shape):
    codec, x = Codec.parse(codec), torch.empty(shape)
    assert codec.message_bytes(shape) == codec.encode(x).numel() == 0
    assert codec.decode(codec.encode(x), shape, torch.bfloat16).shape == shape


@oracles.FIXED
@given(codecs, st.lists(st.integers(0, 9), max_size=3), hiddens)
def test_message_bytes(codec, leading, hidden):
    shape = (*leading, hidden)
    ours = Codec.parse(codec)
    assert ours.message_bytes(shape) == oracles.message_bytes(codec, shape) == ours.encode(torch.zeros(shape)).numel()


@pytest.mark.parametrize(
    "codec", [*oracles.PRESETS, "int5:64:fp32:asym:spike", "int3:16:e5m0:spike", "fp6_e3m2:8:e5m3"]
)
def test_bits_per_value_is_what_a_long_message_takes(codec):
    """To the byte for whole blocks, apart from the row scale of e4m3: 32 bits per row."""
    codec = Codec.parse(codec)
    shape = (128, 4096)
    row_scales = 128 * 4 if ":e4m3" in str(codec) else 0
    assert codec.message_bytes(shape) - row_scales == codec.bits_per_value * 128 * 4096 / 8


def test_grad_and_inference_mode():
    codec = Codec.parse("mxfp4")
    x = oracles.random_tensor((3, 40), seed=15)
    expected = codec.encode(x)
    assert torch.equal(codec.encode(x.clone().requires_grad_()), expected)
    with torch.inference_mode():
        assert torch.equal(codec.encode(x.clone()), expected)
        inside = codec.decode(expected, x.shape, x.dtype)
    assert torch.equal(inside, codec.decode(expected, x.shape, x.dtype))


# Errors.


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8, torch.complex64, torch.float8_e4m3fn])
def test_other_types_are_refused(dtype):
    codec = Codec.parse("mxfp4")
    with pytest.raises(TypeError, match=f"encodes torch.float32, torch.bfloat16, torch.float16, not {dtype}"):
        codec.encode(torch.zeros(2, 32).to(dtype))
    with pytest.raises(TypeError, match=f"decodes to .*, not {dtype}"):
        codec.decode(codec.encode(torch.zeros(2, 32)), (2, 32), dtype)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)], ids=str)
def test_shapes_without_values_along_hidden_are_refused(shape):
    with pytest.raises(ValueError, match="hidden >= 1"):
        Codec.parse("mxfp4").encode(torch.zeros(shape))
    with pytest.raises(ValueError, match="hidden >= 1"):
        Codec.parse("mxfp4").message_bytes(shape)


@pytest.mark.parametrize(
    "messages",
    [
        torch.zeros(2, 47, dtype=torch.uint8),
        torch.zeros(48, dtype=torch.uint8),
        torch.zeros(2, 48),
        torch.zeros(0, 48).byte(),
    ],
    ids=["length", "dimensions", "type", "no ranks"],
)
def test_messages_that_do_not_fit_are_refused(messages):
    codec = Codec.parse("mxfp4")
    assert codec.message_bytes((2, 32)) == 48
    with pytest.raises(ValueError, match=r"decodes \(2, 32\) from uint8 messages of 48 bytes each, not from"):
        codec.decode_sum(messages, (2, 32), torch.float32)


@pytest.mark.parametrize(
    "out",
    [torch.empty(47).byte(), torch.empty(48), torch.empty(96).byte()[::2], torch.empty(48).byte().to("meta")],
    ids=["length", "type", "stride", "device"],
)
def test_room_that_a_message_does_not_fit_is_refused(out):
    codec, x = Codec.parse("mxfp4"), torch.zeros(2, 32)
    with pytest.raises(ValueError, match=r"goes to a contiguous uint8 \(48,\) on cpu, not to"):
        codec.encode(x, out)
    with pytest.raises(ValueError, match=r"goes to a contiguous uint8 \(64,\) on cpu, not to"):
        codec.encode_slices(x, (1, 1), out)  # two messages, whose sections are padded
    with pytest.raises(ValueError, match=r"goes to a contiguous uint8 \(48,\) on cpu, not to"):
        codec.decode_sum_encode(codec.encode(x)[None], (2, 32), codec, out)


def test_pairs():
    pair = parse_codec("int4:32:fp16>mxfp8")
    assert pair == CodecPair(Codec.parse("int4:32:fp16"), Codec.parse("mxfp8"))
    assert pair.bits_per_value == (4.5 + 8.25) / 2
    assert parse_codec(str(pair)) == pair
