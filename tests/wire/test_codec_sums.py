# SPDX-License-Identifier: Apache-2.0
"""Sums of messages, and slices of rows: order and rounding, one transform a sum, fp16's range."""

import itertools

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_comp.wire.codec import Codec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")

codecs = st.sampled_from(oracles.all_codecs())
hiddens = st.sampled_from([1, 2, 7, 8, 9, 31, 33, 64, 100, 257, 600])


def encoded(codec, shape, ranks, dtype=torch.float32):
    """uint8 `[ranks, bytes]` of random tensors."""
    parts = [oracles.random_tensor(shape, dtype, seed=rank) for rank in range(ranks)]
    return torch.stack([Codec.parse(codec).encode(part) for part in parts])


def sum_of(rows, codec, dtype):
    """decode_sum of one tensor of 8 equal values for each rank."""
    codec = Codec.parse(codec)
    messages = torch.stack([codec.encode(torch.full((1, 8), float(value))) for value in rows])
    total = codec.decode_sum(messages, (1, 8), dtype)
    assert (total == total[0, 0]).all()
    return total[0, 0].item()


@pytest.mark.parametrize("codec", ["fp4_e2m1:8:e8m0", "int4:8:e8m0", "fp8_e5m2:8:fp32"])
def test_sums_are_taken_in_rank_order(codec):
    """2^27 + 1 is 2^27 in fp32, so that the order of three ranks shows."""
    big = 2.0**27
    assert {order: sum_of(order, codec, torch.float32) for order in itertools.permutations((big, 1.0, -big))} == {
        (big, 1.0, -big): 0.0,
        (1.0, big, -big): 0.0,
        (-big, 1.0, big): 0.0,
        (1.0, -big, big): 0.0,
        (big, -big, 1.0): 1.0,
        (-big, big, 1.0): 1.0,
    }
    assert sum_of((1.0, 1.0, big), codec, torch.float32) == sum_of((big, 1.0, 1.0), codec, torch.float32)
    assert sum_of((8.0, 8.0, big), codec, torch.float32) == big + 16 != sum_of((big, 8.0, 8.0), codec, torch.float32)


@pytest.mark.parametrize("dtype, big", [(torch.bfloat16, 256.0), (torch.float16, 2048.0)], ids=["bf16", "fp16"])
def test_sums_are_rounded_once(dtype, big):
    """256 + 1 + 1 is 258 in bf16; rounded after each addition it would stay 256."""
    assert sum_of((big, 1.0, 1.0), "int4:8:e8m0", dtype) == big + 2
    one = torch.ones((), dtype=dtype)
    assert (one * big + one + one).item() == big


def test_sums_multiply_and_add_apart():
    """y + (-y) is exactly 0 if each product is rounded; a fused multiply-add would leave the product's rounding."""
    codec = Codec.parse("int8:32:fp32")
    x = oracles.random_tensor((64, 64), seed=16)
    found = oracles.read(codec.encode(x), str(codec), 64, 64)
    scales = np.repeat(oracles.scale_values(found["scale"], "fp32"), 32, axis=1).astype(np.float64)
    product = oracles.element_table("int8")[found["payload"]] * scales
    assert (product != product.astype(np.float32)).mean() > 0.5, "a fused sum would differ"
    total = codec.decode_sum(torch.stack([codec.encode(-x), codec.encode(x)]), x.shape, torch.float32)
    assert not total.any()


@oracles.FIXED
@given(codecs, st.integers(2, 5), hiddens, st.sampled_from(DTYPES))
def test_sums_equal_the_oracle(codec, ranks, hidden, dtype):
    """Blocks that were transformed are summed so, and transformed back once."""
    messages = encoded(codec, (3, hidden), ranks, dtype)
    expected = torch.from_numpy(oracles.decoded_sum(messages, codec, 3, hidden)).to(dtype)
    assert oracles.same_bits(Codec.parse(codec).decode_sum(messages, (3, hidden), dtype), expected)


@pytest.mark.parametrize("block", oracles.BLOCKS)
def test_a_sum_is_transformed_back_once(block):
    """Transforming each rank's values back has other last bits: the test above can tell."""
    codec, shape = f"int8:{block}:fp32:hadamard", (16, 3 * block + 5)
    messages = encoded(codec, shape, 4)
    ours = Codec.parse(codec).decode_sum(messages, shape, torch.float32)
    each = sum(Codec.parse(codec).decode(message, shape, torch.float32) for message in messages)
    assert (ours != each)[:, : 3 * block].float().mean() > 0.1
    assert torch.equal(ours[:, 3 * block :], each[:, 3 * block :]), "a short block is not transformed"
    torch.testing.assert_close(ours, each, rtol=0, atol=2.0**-19 * each.abs().max().item())


# The middle of a two-step sum.


@pytest.mark.parametrize(
    "first", ["int8:32:fp32:hadamard", "int5:32:fp16:asym:hadamard:spike", "fp4_e2m1:32:e4m3:hadamard"]
)
@pytest.mark.parametrize("second", ["int8:32:fp32", "fp6_e2m3:32:bf16", "int4:32:fp32", "fp4_e2m1:32:e4m3"])
@pytest.mark.parametrize("hidden", [96, 109])
def test_between_equal_blocks_nothing_is_transformed(first, second, hidden):
    """The second message holds what the codec without `hadamard` makes of the transformed sum, to the last bit."""
    messages, both = encoded(first, (6, hidden), 3), Codec.parse(f"{second}:hadamard")
    ours = Codec.parse(first).decode_sum_encode(messages, (6, hidden), both)
    expected = oracles.encode(oracles.decoded_sum(messages, first, 6, hidden, transformed=True), second)
    found = oracles.read(ours, str(both), 6, hidden)
    assert found.keys() == expected.keys()
    for field, codes in expected.items():
        np.testing.assert_array_equal(found[field], codes)


@oracles.FIXED
@given(codecs, codecs, st.integers(1, 4), hiddens)
def test_between_other_blocks_the_sum_is_encoded(first, second, ranks, hidden):
    """Where not both codecs transform blocks of one size: as if the fp32 sum were a tensor like any other."""
    if all("hadamard" in codec for codec in (first, second)) and first.split(":")[1] == second.split(":")[1]:
        second = second.replace(":hadamard", "")
    messages, second = encoded(first, (3, hidden), ranks), Codec.parse(second)
    total = torch.from_numpy(oracles.decoded_sum(messages, first, 3, hidden))
    assert torch.equal(Codec.parse(first).decode_sum_encode(messages, (3, hidden), second), second.encode(total))


def test_a_block_with_nan_stays_so_where_nothing_is_transformed():
    codec, shape = Codec.parse("int8:8:fp32:hadamard"), (1, 24)
    bad = torch.ones(shape)
    bad[0, 10] = NAN
    messages = torch.stack([codec.encode(torch.ones(shape)), codec.encode(bad)])
    y = codec.decode(codec.decode_sum_encode(messages, shape, codec), shape, torch.float32)
    assert y[0, 8:16].isnan().all()
    torch.testing.assert_close(y[0, [*range(8), *range(16, 24)]], torch.full((16,), 2.0), rtol=2.0**-7, atol=0)


# Half precision's range.


@pytest.mark.parametrize("codec", ["int8:8:fp32", "mxfp8", "int4:8:fp16:hadamard", "int8:8:fp32:asym:spike"])
def test_a_sum_beyond_fp16_is_infinite_in_both_algorithms(codec):
    """40000 + 40000, as without codecs; each of them is in reach."""
    codec, x = Codec.parse(codec), torch.tensor([[40000.0, -40000.0]], dtype=torch.float16).repeat_interleave(8, 1)
    messages = torch.stack([codec.encode(x)] * 2)
    assert codec.decode(messages[0], x.shape, x.dtype).isfinite().all()
    gathered = codec.decode_sum(messages, x.shape, x.dtype)
    slots = codec.decode_sum_encode(messages, x.shape, codec)[None]
    in_two_steps = codec.decode_slices(slots, (1,), torch.full_like(x, NAN))
    assert torch.equal(gathered, x + x) and torch.equal(in_two_steps, x + x) and gathered.isinf().all()


def test_a_sum_that_comes_back_into_fp16_is_what_it_is():
    """Summands are not cut to fp16's range: 80000 - 40000."""
    codec = Codec.parse("int8:8:fp32")
    messages = torch.stack([codec.encode(torch.full((1, 8), value)) for value in (80000.0, -40000.0)])
    assert torch.equal(codec.decode_sum(messages, (1, 8), torch.float16), torch.full((1, 8), 40000.0).half())


@pytest.mark.parametrize("codec", ["int8:8:e8m0:ceil", "fp4_e2m1:8:e8m0:even", "int8:8:fp32:hadamard"])
def test_one_message_saturates_in_fp16(codec):
    """A power-of-two scale rounds 65504 up to 65536, and a message may hold any fp32 numbers."""
    codec, out = Codec.parse(codec), torch.empty(1, 8, dtype=torch.float16)
    message = codec.encode(torch.full((1, 8), -80000.0))
    assert (codec.decode(message, (1, 8), torch.float16) == -65504).all()
    assert (codec.decode_slices(message[None], (1,), out) == -torch.inf).all(), "a sum's message does not"


# Slices.

ROWS = [(5, 4, 4), (4, 3, 0), (1,), (0, 2, 0), (1, 1, 1, 1, 0, 0, 0, 0), (7, 1, 12)]


@pytest.mark.parametrize("rows", ROWS, ids=str)
@oracles.FIXED
@given(codecs, hiddens, st.sampled_from(DTYPES), st.booleans())
def test_slices_are_messages_one_after_another(rows, codec, hidden, dtype, strided):
    codec, x = Codec.parse(codec), oracles.random_tensor((sum(rows), 2 * hidden), dtype, seed=sum(rows))
    x = x[:, ::2] if strided else x[:, :hidden].contiguous()
    alone = torch.cat([codec.encode(part) for part in x.split(rows)])
    assert torch.equal(codec.encode_slices(x, rows), alone)
    room = torch.full_like(alone, 0xFF)
    assert codec.encode_slices(x, [*rows], room) is room and torch.equal(room, alone)


@pytest.mark.parametrize("rows", ROWS, ids=str)
@oracles.FIXED
@given(codecs, hiddens, st.sampled_from(DTYPES), st.integers(0, 3))
def test_slots_are_decoded_into_their_rows(rows, codec, hidden, dtype, longer):
    """What a message leaves of its slot is garbage, which nobody reads."""
    codec, x = Codec.parse(codec), oracles.random_tensor((sum(rows), hidden), dtype, seed=sum(rows))
    messages = [codec.encode(part) for part in x.split(rows)]
    slots = torch.full((len(rows), max(map(len, messages)) + 16 * longer), 0xFF, dtype=torch.uint8)
    for slot, message in zip(slots, messages, strict=True):
        slot[: len(message)] = message
    margin = torch.full((len(x) + 2, hidden), NAN, dtype=dtype)
    out = margin[1:-1]
    assert codec.decode_slices(slots, rows, out) is out
    expected = [codec.decode(message, (n, hidden), torch.float32) for message, n in zip(messages, rows, strict=True)]
    assert oracles.same_bits(out, torch.cat(expected).to(dtype))
    assert margin[0].isnan().all() and margin[-1].isnan().all()


def test_slices_of_nothing():
    codec = Codec.parse("mxfp4")
    for rows in [(), (0, 0)]:
        assert codec.encode_slices(torch.empty(0, 33), rows).shape == (0,)
        out = torch.empty(0, 33)
        assert codec.decode_slices(torch.empty(len(rows), 16).byte(), rows, out) is out


@pytest.mark.parametrize("rows", [(1, 1), (2, 2), (4, -1), ()], ids=str)
def test_slices_that_do_not_make_up_the_tensor_are_refused(rows):
    codec, x = Codec.parse("mxfp4"), torch.zeros(3, 32)
    with pytest.raises(ValueError, match=r"do not make up a tensor of \(3, 32\)"):
        codec.encode_slices(x, rows)
    with pytest.raises(ValueError, match=r"do not make up a tensor of \(3, 32\)"):
        codec.decode_slices(torch.zeros(len(rows), 64).byte(), rows, x)


@pytest.mark.parametrize(
    "slots",
    [torch.zeros(2, 47).byte(), torch.zeros(3, 48).byte(), torch.zeros(96).byte(), torch.zeros(2, 48)],
    ids=["too short", "too many", "dimensions", "type"],
)
def test_slots_that_do_not_fit_are_refused(slots):
    with pytest.raises(ValueError, match=r"slices of \(2, 1\) rows from 2 uint8 slots of at least 48 bytes, not from"):
        Codec.parse("mxfp4").decode_slices(slots, (2, 1), torch.empty(3, 32))


def test_slices_of_other_types_are_refused():
    codec = Codec.parse("mxfp4")
    with pytest.raises(TypeError, match="encodes .*, not torch.float64"):
        codec.encode_slices(torch.zeros(2, 32).double(), (1, 1))
    with pytest.raises(TypeError, match="decodes to .*, not torch.int32"):
        codec.decode_slices(torch.zeros(2, 48).byte(), (1, 1), torch.zeros(2, 32).int())
