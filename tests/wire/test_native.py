# SPDX-License-Identifier: Apache-2.0
"""The CPU backend writes the reference's bytes and sums to its bits."""

import functools
import itertools
import platform

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_comp.wire import message, native, reference
from megatron_comp.wire.formats import SCALES, Format, Minifloat

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="needs a C compiler")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 7), (5, 33), (2, 4129), (9, 576), (1, 3000)]
MAGNITUDES = [1.0, 1e-3, 3e4, 1e30, 1e-30, 1e-37, 1e-7]
NAN, INF = float("nan"), float("inf")
CORNERS = [
    *([NAN], [INF], [-INF], [INF, -INF], [1, NAN, 2], [0, 0, 0, INF], [-NAN, 1e30]),
    *([0.0], [-0.0], [0.0, -0.0], [1e-39], [-1e-39, 0], [2.0**-127, -(2.0**-130)]),
    *([1e30], [1e30, -1e30, 1e-30], [1e-30, 1e-38], [-5, 2.0**-126], [2.0**-126, -(2.0**-125)], [2.0**-24], [1.0]),
    *([oracles.BF16_MAX, -oracles.BF16_MAX], [1, -oracles.BF16_MAX], [3.4028e38, 0], [65504, -65504], [65520, 6e-8]),
    *([0.25, 0.5, 0.75, 1.25, 2.5, 5.0, -3.5, 7.0], [7.5, -6.5, 0.5, -1.5], [127.5, 126.5, -127.5, 0.5]),
]


def same(fmt, tensors, second):
    """Native and reference, on tensors [rows, hidden] of the ranks: messages, sums of all types, the sum's message,
    and the same of slices of rows.

    Outputs begin as 0xFF or NaN, with a margin that must stay so.
    """
    shape = tensors[0].shape

    def written(backend, function, fmt, *arguments):
        nbytes = message.layout(fmt, *shape).nbytes
        margin = torch.full((nbytes + 40,), 0xFF, dtype=torch.uint8)
        getattr(backend, function)(*arguments, margin[17 : 17 + nbytes])
        assert (margin[:17] == 0xFF).all() and (margin[17 + nbytes :] == 0xFF).all()
        return margin[17 : 17 + nbytes]

    def summed(backend, messages, dtype):
        margin = torch.full((shape[0] + 2, shape[1]), NAN, dtype=dtype)
        backend.decode_sum(messages, fmt, margin[1:-1])
        assert margin[0].isnan().all() and margin[-1].isnan().all()
        return margin[1:-1]

    messages = [written(reference, "encode", fmt, x, fmt) for x in tensors]
    for x, expected in zip(tensors, messages, strict=True):
        assert torch.equal(written(native, "encode", fmt, x, fmt), expected), f"{fmt} {x.dtype} {tuple(shape)}"
    messages = torch.stack(messages)
    for dtype in DTYPES:
        sums = [summed(backend, messages, dtype) for backend in (native, reference)]
        assert oracles.same_bits(*sums), f"{fmt} sum to {dtype} {tuple(shape)} of {len(messages)}"
    both = [
        written(backend, "decode_sum_encode", second, messages, shape, fmt, second) for backend in (native, reference)
    ]
    assert torch.equal(*both), f"{fmt} > {second} {tuple(shape)} of {len(messages)}"
    same_slices(fmt, tensors)


def same_slices(fmt, tensors):
    """Native and reference, on slices of half the rows, of none, and of the others: of the first tensor, and of the sum
    of all. Their messages are decoded from slots that end in garbage, one by one and added up."""
    (count, hidden), x = tensors[0].shape, tensors[0]
    rows, parts = (count // 2, 0, count - count // 2), torch.stack(tensors)
    sizes = [message.layout(fmt, each, hidden).nbytes for each in rows]
    slots = []
    for function, source in (("encode_slices", x), ("sum_encode", parts)):
        ours, theirs = (torch.full((sum(sizes) + 40,), 0xFF, dtype=torch.uint8) for _ in range(2))
        for backend, margin in ((native, ours), (reference, theirs)):
            getattr(backend, function)(source, fmt, rows, margin[17 : 17 + sum(sizes)])
        assert torch.equal(ours, theirs), f"{function} {fmt} slices {rows} of {tuple(source.shape)}"
        slots.append(torch.full((len(rows), max(sizes) + 7), 0xFF, dtype=torch.uint8))
        for slot, sent in zip(slots[-1], ours[17:-23].split(sizes), strict=True):
            slot[: len(sent)] = sent
    of_both = torch.stack(slots, dim=1).flatten(0, 1)
    for number, dtype in enumerate(DTYPES):
        messages, each = (of_both, 2) if number == len(tensors) % 3 else (slots[0], 1)
        ours, theirs = (torch.full((count + 2, hidden), NAN, dtype=dtype) for _ in range(2))
        for backend, margin in ((native, ours), (reference, theirs)):
            backend.decode_slices(messages, fmt, rows, margin[1:-1], each)
        assert oracles.same_bits(ours, theirs), f"{fmt} slices {rows} of {each} to {dtype} {tuple(x.shape)}"
        assert ours[0].isnan().all() and ours[-1].isnan().all()


@functools.cache
def corner_rows(width, dtype):
    """A row for each corner, repeated; and all corners in turn, each over 16 values of longer rows."""
    rows = [torch.tensor(values).repeat(width)[:width] for values in CORNERS]
    mixed = torch.cat([row[:16] for row in rows])
    rows += [mixed.roll(shift).repeat(width)[:width] for shift in (0, 8, 24)]
    return torch.stack(rows).to(dtype)


@pytest.mark.parametrize("element, scale", oracles.ELEMENTS_WITH_SCALES)
def test_equals_the_reference(element, scale):
    """A share of blocks, rules and sets of flags; blocks of options, magnitudes, shapes, types and ranks go around."""
    options, number = oracles.some_options(element, scale, 4), oracles.ELEMENTS.index(element)
    blocks = itertools.islice(itertools.cycle(oracles.BLOCKS), number, None)
    names = [oracles.name(element, block, scale) for block in oracles.some_blocks(element, scale)]
    names += [oracles.name(element, block, scale, *o) for o, block in zip(options, blocks)]
    for seed, (name, after) in enumerate(zip(names, [*names[1:], "mxfp4"], strict=True), number):
        shape, magnitude, dtype = SHAPES[seed % 6], MAGNITUDES[seed % 7], DTYPES[seed % 3]
        tensors = [
            (oracles.random_tensor(shape, seed=seed + rank, spread=seed % 9) * magnitude).to(dtype)
            for rank in range(1 + seed % 5)
        ]
        same(Format.parse(name), tensors, Format.parse(after))


@pytest.mark.parametrize("element, scale", oracles.ELEMENTS_WITH_SCALES)
def test_equals_the_reference_in_corners(element, scale):
    number = oracles.ELEMENTS.index(element)
    blocks = itertools.islice(itertools.cycle(oracles.BLOCKS), number, None)
    for seed, (option, block) in enumerate(zip(oracles.some_options(element, scale, 4), blocks), number):
        fmt = Format.parse(oracles.name(element, block, scale, *option))
        x = corner_rows(2 * block + 5, DTYPES[seed % 3])
        same(fmt, [x, x.roll(1, 0)][: 1 + seed % 2], fmt)


@oracles.FIXED
@given(
    st.sampled_from(oracles.all_codecs()),
    st.sampled_from(oracles.all_codecs()),
    st.tuples(st.integers(1, 5), st.integers(1, 700)),
    st.sampled_from(DTYPES),
    st.integers(1, 5),
    st.integers(0, 10**6),
)
def test_any_bits(first, second, shape, dtype, ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (ranks, *shape), generator=generator).int()
    same(Format.parse(first), list(bits.view(torch.float32).to(dtype)), Format.parse(second))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int5:256:e5m0:asym:spike", "int3:8:fp16:hadamard"])
@pytest.mark.parametrize("shape", [(37, 576), (1, 16384), (3, 70001), (300, 8)], ids=str)
def test_large_tensors(name, shape):
    tensors = [oracles.random_tensor(shape, torch.bfloat16, seed=seed) for seed in range(3)]
    same(Format.parse(name), tensors, Format.parse("int8:128:e4m3"))


@pytest.mark.parametrize("element", ["fp8_e4m3", "fp8_e5m2"])
def test_codes_that_are_no_numbers(element):
    """Encoding never sends them; they decode as in the reference."""
    fmt = Format.parse(f"{element}:256:e8m0")
    fields = {"payload": torch.arange(256).view(1, 256).numpy(), "scale": torch.full((1, 1), 130).numpy()}
    sent = oracles.write(fields, str(fmt), 1, 256).unsqueeze(0)
    for dtype in DTYPES:
        sums = [torch.empty(1, 256, dtype=dtype) for _ in range(2)]
        for backend, out in zip((native, reference), sums, strict=True):
            backend.decode_sum(sent, fmt, out)
        assert oracles.same_bits(*sums) and sums[0].isnan().any()


NEW_ROWS = [
    *(Minifloat("fp8_e3m4", 3, 4), Minifloat("fp8_e2m5", 2, 5), Minifloat("fp8_e6m1", 6, 1)),
    *(Minifloat("fp7_e2m4", 2, 4), Minifloat("fp7_e3m3", 3, 3), Minifloat("fp6_e1m4", 1, 4)),
    # Some of their codes are not numbers.
    *(Minifloat("fp4_e2m1n", 2, 1, 1), Minifloat("fp6_e3m2n", 3, 2, 4), Minifloat("fp8_e3m4n", 3, 4, 1)),
]


@pytest.mark.parametrize("element", NEW_ROWS, ids=lambda element: element.name)
@pytest.mark.parametrize("scale", ["e8m0", "e4m3", "fp16"])
def test_a_row_is_all_that_a_new_format_needs(element, scale):
    """Values, and every code, of formats that no table has."""
    for block, options in itertools.product((8, 32), ({}, {"search": True}, {"hadamard": True})):
        fmt = Format(element, block, SCALES[scale], **options)
        tensors = [oracles.random_tensor((5, 576), seed=seed, spread=4) for seed in range(2)]
        same(fmt, tensors, fmt)
        same(fmt, [corner_rows(2 * block + 5, torch.bfloat16)], fmt)
    fmt = Format(element, 32, SCALES[scale])
    layout = message.layout(fmt, 16, 256)
    sent = torch.empty(1, layout.nbytes, dtype=torch.uint8)
    reference.encode(oracles.random_tensor((16, 256)), fmt, sent[0])
    for plane in layout.fields["payload"]:
        any_bytes = torch.randint(
            0, 256, (plane.end - plane.offset,), generator=torch.Generator().manual_seed(plane.offset)
        )
        sent[0, plane.offset : plane.end] = any_bytes
    sums = [torch.empty(16, 256) for _ in range(2)]
    for backend, out in zip((native, reference), sums, strict=True):
        backend.decode_sum(sent, fmt, out)
    assert oracles.same_bits(*sums)
    assert sums[0].isnan().any() == (element.specials > 0)


@pytest.mark.parametrize("codec", ["nvfp4", "int4:16:e4m3", "int8:16:e4m3:asym", "fp6_e3m2:16:e4m3:hadamard"])
def test_scales_of_e4m3_have_no_sign(codec):
    """All 256 codes in turn: from 127 on they are NaN, and so is the whole block; encoding sends none of these."""
    fmt, shape = Format.parse(codec), (1, 256 * 16)
    sent = torch.empty(message.layout(fmt, *shape).nbytes, dtype=torch.uint8)
    reference.encode(oracles.random_tensor(shape), fmt, sent)
    message.write(sent, message.layout(fmt, *shape).fields["scale"], 0, torch.arange(256).view(1, 256))
    sums = [torch.empty(shape) for _ in range(2)]
    for backend, out in zip((native, reference), sums, strict=True):
        backend.decode_sum(sent.unsqueeze(0), fmt, out)
    assert oracles.same_bits(*sums)
    nan = sums[0].view(256, 16).isnan()
    assert not nan[:127].any() and nan[127:].all()


@pytest.mark.parametrize("codec", oracles.all_codecs()[::61])
def test_messages_at_odd_addresses(codec):
    """Bytes of a larger buffer, as a socket or a file leaves them: both backends take them."""
    fmt, shape = Format.parse(codec), (3, 97)
    x, nbytes = oracles.random_tensor(shape), message.layout(fmt, *shape).nbytes
    found = []
    for backend, start in itertools.product((native, reference), (0, 1, 3)):
        buffer = torch.empty(2 * nbytes + 5, dtype=torch.uint8)
        messages = buffer[start : start + 2 * nbytes].view(2, nbytes)
        for sent in messages:
            backend.encode(x, fmt, sent)
        out = torch.empty(shape)
        backend.decode_sum(messages, fmt, out)
        again = torch.empty(nbytes + 1, dtype=torch.uint8)[1:]
        backend.decode_sum_encode(messages, shape, fmt, fmt, again)
        slices = torch.empty(shape)
        backend.decode_slices(messages[:1], fmt, (3,), slices)
        found.append((messages.clone(), out, again.clone(), slices))
    for each in found[1:]:
        assert torch.equal(each[0], found[0][0]) and torch.equal(each[2], found[0][2])
        assert oracles.same_bits(each[1], found[0][1]) and oracles.same_bits(each[3], found[0][3])


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[::3],
        lambda x: x.t(),
        lambda x: x[1:, 3:],
        lambda x: x[:, :1].expand(-1, 50),
        lambda x: x[2:3].expand(9, -1),
        lambda x: x.reshape(-1)[1:-28].view(-1, 29),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views(view, dtype):
    """Of tensors, and of messages: rows apart, at odd addresses, bytes apart."""
    x, fmt = view(oracles.random_tensor((36, 35), dtype)[:, :29].reshape(36, 29)), Format.parse("int5:16:fp16:asym")
    same(fmt, [x, x], fmt)
    nbytes = message.layout(fmt, *x.shape).nbytes
    wide = torch.zeros(3, 2 * nbytes + 3, dtype=torch.uint8)
    plain = torch.empty(2, nbytes, dtype=torch.uint8)
    for rank in range(2):
        native.encode(x, fmt, plain[rank])
    sums = []
    for messages in (plain, wide[1:, 1 : nbytes + 1], wide[::2, 3 : nbytes + 3], wide[:2, 1 : 2 * nbytes : 2]):
        messages.copy_(plain)
        sums.append(torch.empty(x.shape, dtype=dtype))
        native.decode_sum(messages, fmt, sums[-1])
    assert all(torch.equal(other, sums[0]) for other in sums)


# Compilers and processors.

PRESETS_AND_MORE = [
    *oracles.PRESETS,
    *("int4:32:fp16:hadamard", "fp6_e3m2:128:e5m3:hadamard:search", "int7:64:bf16:asym:search:spike"),
    *("fp8_e5m2:8:fp32", "int2:256:e8m0:even:spike", "fp3_e1m1:16:e5m0:ceil", "fp5_e3m1:32:e8m0"),
]


@pytest.fixture
def other_flags(monkeypatch):
    """A function that has the library compiled with other flags, for one test."""

    def use(*flags):
        monkeypatch.setattr(native, "FLAGS", [*native.FLAGS, *flags])
        native._library.cache_clear()

    yield use
    native._library.cache_clear()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of x86-64")
@pytest.mark.parametrize("flags", ["-march=x86-64", "-march=x86-64-v3", "-mno-avx512f", "-O1"])
def test_equals_the_reference_on_other_processors(flags, other_flags):
    other_flags(flags)
    for seed, name in enumerate(PRESETS_AND_MORE):
        fmt, dtype = Format.parse(name), DTYPES[seed % 3]
        same(fmt, [oracles.random_tensor((5, 1300), dtype, seed=seed + rank) for rank in range(2)], fmt)
        same(fmt, [corner_rows(2 * fmt.block + 5, dtype)], fmt)
