# SPDX-License-Identifier: Apache-2.0
"""Codecs, tensors and checks for the kernels: what one writes must be what `wire/reference.py` writes, bit for bit.

On a GPU the checks run compiled kernels; without one Triton's interpreter (see conftest.py), whose time goes by
programs, some 20 ms each whatever they hold: tensors here are few rows of many blocks. This file needs torch and numpy
alone, as a bare GPU machine has them.
"""

import itertools
import math
import random

import interpreter
import torch

from megatron_comp.wire import gpu, message, reference
from megatron_comp.wire.formats import (
    BLOCK_SIZES,
    ELEMENTS,
    FLAGS,
    PRESETS,
    ROUNDING_RULES,
    SCALES,
    Format,
    Integer,
    Levels,
    PowerOfTwo,
)

interpreter.quicken()

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Values a program, where a test wraps parts of a kernel: few programs for the interpreter, not too much for a thread.
PROGRAM = 1 << 14
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# Codecs.


def flag_sets(element: str) -> list[tuple[str, ...]]:
    """Every set of flags that goes with the element."""
    flags = FLAGS if isinstance(ELEMENTS[element], Integer) else ("hadamard", "search")
    return [chosen for count in range(len(flags) + 1) for chosen in itertools.combinations(flags, count)]


def rules(scale: str) -> tuple[str, ...]:
    return ROUNDING_RULES if isinstance(SCALES[scale], PowerOfTwo) else ("",)


def goes_with(element: str, scale: str) -> bool:
    """A block of zeros needs a zero in its element or in its scale."""
    return not (isinstance(ELEMENTS[element], Levels) and isinstance(SCALES[scale], PowerOfTwo))


def name(*parts) -> str:
    return ":".join(str(part) for part in parts if part != "")


def _elements_with_scales() -> list[str]:
    """Each pair once; blocks and rules take turns so that each meets every element and every scale."""
    codecs = []
    for (i, element), (j, scale) in itertools.product(enumerate(ELEMENTS), enumerate(SCALES)):
        if not goes_with(element, scale):
            continue
        rule = rules(scale)[(i + j) % len(rules(scale))]
        codecs.append(name(element, BLOCK_SIZES[(i + j) % len(BLOCK_SIZES)], scale, rule))
    return codecs


def _options_with_scales() -> list[str]:
    """Each set of flags with every scale, for each kind of element; elements, blocks and rules take turns."""
    codecs = []
    integers = [element for element in ELEMENTS if element.startswith("int")]
    minifloats = [element for element in ELEMENTS if element.startswith("fp")]
    levels = [element for element in ELEMENTS if element.startswith("lloyd")]
    for elements in (integers, minifloats, levels):
        for turn, (flags, scale) in enumerate(itertools.product(flag_sets(elements[0])[1:], SCALES)):
            if not goes_with(elements[0], scale):
                continue
            block = BLOCK_SIZES[turn % len(BLOCK_SIZES)]
            rule = rules(scale)[turn // 2 % len(rules(scale))]
            codecs.append(name(elements[turn % len(elements)], block, scale, rule, *flags))
    return codecs


PLAIN = _elements_with_scales()
OPTIONS = _options_with_scales()


# Two random halves of them, always the same, one for each of two kernels. The stages are tested by themselves over all
# that there is, in test_numbers, test_scales, test_blocks and test_planes.
_SHUFFLED = random.Random(0).sample(PLAIN + OPTIONS, len(PLAIN + OPTIONS))
TO_ENCODE, TO_DECODE = _SHUFFLED[::2], _SHUFFLED[1::2]
# Some of everything, for what is tested in every way.
MIXED = [
    *PRESETS,
    "int4:32:fp16:hadamard",
    "int5:32:fp16:hadamard",
    "int2:32:bf16:asym:spike",
    "int7:64:fp16:spike",
    "fp6_e3m2:16:e5m3:search",
    "int8:8:fp32",
    "int3:256:e4m3:asym:hadamard:spike",
    "fp3_e1m1:128:e5m0:even",
    "lloyd4:32:e5m3:hadamard",
]


# Tensors.


def shapes(fmt: Format) -> dict[str, tuple[int, int]]:
    """One shape for each way through the kernels. Which way that is depends on the format: see `path`."""
    return {
        "one row": (1, 1024),
        "whole blocks": (3, 1024),
        "a short last block": (2, 32 * fmt.block - fmt.block // 2),
        "rows on words": (2, 4 * fmt.block - 8 * (fmt.block > 8)),
        "odd bytes": (2, 1023),
        "tiles": (2, 4096 + 33),
        "short": (5, 7),
        "single values": (3, 1),
    }


def turns(codec: str, kernel: int) -> list[tuple[int, tuple[int, int]]]:
    """Every second shape with its number: what kernel 0 leaves kernel 1 takes, and the codecs of MIXED take turns."""
    numbered = [*enumerate(shapes(Format.parse(codec)).values())]
    return numbered[(MIXED.index(codec) + kernel) % 2 :: 2]


def flat_or_ragged(fmt: Format, turn: int) -> tuple[int, int]:
    """Two rows: in one program where the format allows it, or in two, with an end amid a block.

    A search costs the interpreter most, so that fewer of them are ragged.
    """
    return (2, 3000 + turn // 4) if turn % (4 if fmt.search else 2) == 0 else (2, 1024 + turn % 5 * 256)


def path(fmt: Format, shape: tuple[int, int]) -> tuple[bool, int]:
    """(whether the rows are taken for one long row, bytes that every row of every section starts on)."""
    flat = gpu._is_flat(fmt, shape[1])
    return flat, gpu._align(fmt, *shape, flat)


def tensor(shape: tuple[int, int], dtype: torch.dtype, block: int, seed: int = 0) -> torch.Tensor:
    """`[rows, hidden]` of blocks that are each of one kind.

    Rows take turns, tame ones first: wild blocks would leave the others of a row-scaled row nothing but zeros.
    """
    g = torch.Generator().manual_seed(seed)
    blocks = -(-shape[1] // block)
    size = (shape[0], blocks, block)

    def power(spread):
        return ((torch.rand(size[:2], generator=g) * 2 - 1) * spread).exp2()[..., None]

    def at_one_place(value, others):
        return others.clone().scatter_(2, torch.randint(block, (*size[:2], 1), generator=g), value)

    normal = torch.randn(size, generator=g)
    signs = torch.where(torch.rand(size, generator=g) < 0.5, -1.0, 1.0)
    zeros = signs * 0.0
    info = torch.finfo(dtype)
    integer = torch.int16 if dtype.itemsize == 2 else torch.int32
    anything = torch.randint(torch.iinfo(integer).min, torch.iinfo(integer).max + 1, size, generator=g)
    tame = [
        normal * power(3),
        normal * power(3),
        torch.randint(-128, 129, size, generator=g) / 64,  # many ties
        torch.randint(-7, 8, size, generator=g) * power(2).log2().round().exp2(),
        normal[..., :1].expand(size),  # all alike
        zeros,
        3 + torch.rand(size, generator=g),  # off centre
        at_one_place(math.nan, normal),
    ]
    wild = [
        at_one_place(math.inf, normal),
        at_one_place(-math.inf, signs),
        signs * info.max,
        at_one_place(-info.max, normal),
        normal * min(1e30, info.max / 8),
        normal * max(1e-30, info.tiny),
        signs * info.tiny / 4,  # subnormals
        at_one_place(info.tiny, signs * info.tiny / 4),
        at_one_place(1.0, zeros),
        normal * power(16),
        normal * power(120 if info.max > 1e30 else 12),
        anything.to(integer).view(dtype).float(),
    ]
    choice = torch.where(
        torch.arange(shape[0])[:, None] % 2 == 0,
        torch.randint(len(tame), size[:2], generator=g),
        torch.randint(len(wild), size[:2], generator=g) + len(tame),
    )
    x = torch.stack([kind.expand(size) for kind in tame + wild])
    x = x.gather(0, choice[None, ..., None].expand(1, *size))[0].flatten(1)[:, : shape[1]]
    return torch.where(x.isfinite(), x.clamp(-info.max, info.max), x).to(dtype)


class Guarded:
    """An output in the middle of a larger buffer; all of it holds 0xFF, which as a float is NaN."""

    MARGIN = 64

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        nbytes = math.prod(shape) * dtype.itemsize
        self.buffer = torch.full((nbytes + 2 * self.MARGIN,), 0xFF, dtype=torch.uint8, device=DEVICE)
        self.tensor = self.buffer[self.MARGIN : self.MARGIN + nbytes].view(dtype).view(shape)

    def untouched_around(self) -> bool:
        return bool((self.buffer[: self.MARGIN] == 0xFF).all() and (self.buffer[-self.MARGIN :] == 0xFF).all())


def encoded(fmt: Format, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The reference's messages `[ranks, nbytes]` on DEVICE, some bytes apart from each other."""
    nbytes = message.layout(fmt, *tensors[0].shape).nbytes
    messages = torch.full((len(tensors), nbytes + 48), 0xFF, dtype=torch.uint8)
    for x, its in zip(tensors, messages):
        reference.encode(x, fmt, its[:nbytes])
    return messages.to(DEVICE)[:, :nbytes]


# Checks.


def check_encode(fmt: Format, x: torch.Tensor) -> None:
    """`x` on DEVICE, strided or not."""
    nbytes = message.layout(fmt, *x.shape).nbytes
    out = Guarded((nbytes,), torch.uint8)
    gpu.encode(x, fmt, out.tensor)
    expected = torch.empty(nbytes, dtype=torch.uint8)
    reference.encode(x.cpu(), fmt, expected)
    _compare_messages(out, expected, fmt, x.shape)


def check_decode_sum(fmt: Format, messages: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    out = Guarded(shape, dtype)
    gpu.decode_sum(messages, fmt, out.tensor)
    expected = torch.empty(shape, dtype=dtype)
    reference.decode_sum(messages.cpu(), fmt, expected)
    assert_same_bits(out.tensor.cpu(), expected)
    assert out.untouched_around()


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """But that any NaN equals any other."""
    integer = torch.int16 if expected.element_size() == 2 else torch.int32
    wrong = (found.view(integer) != expected.view(integer)) & ~(found.isnan() & expected.isnan())
    places = wrong.nonzero()[:3].tolist()
    assert not places, f"{wrong.sum()} of {wrong.numel()} differ: " + "; ".join(
        f"at {place} {found[tuple(place)].item()!r}, not {expected[tuple(place)].item()!r}" for place in places
    )


def check_slices(fmt: Format, rows: tuple[int, ...], hidden: int, dtype: torch.dtype, seed: int = 0) -> None:
    """All slices at once make the bytes, and from slots the values, of each slice by itself."""
    x = tensor((sum(rows), hidden), dtype, fmt.block, seed)
    sizes = [message.layout(fmt, count, hidden).nbytes for count in rows]
    slots = torch.full((len(rows), max(sizes)), 0xFF, dtype=torch.uint8)
    expected = torch.empty(x.shape, dtype=dtype)
    for part, slot, size, total in zip(x.split(rows), slots, sizes, expected.split(rows)):
        if len(part):
            reference.encode(part, fmt, slot[:size])
            # They are messages of sums, which may be infinite in half precision.
            wide = torch.empty(part.shape)
            reference.decode_sum(slot[None, :size], fmt, wide)
            total.copy_(wide)
    out = Guarded((sum(sizes),), torch.uint8)
    gpu.encode_slices(x.to(DEVICE), fmt, rows, out.tensor)
    assert torch.equal(out.tensor.cpu(), torch.cat([slot[:size] for slot, size in zip(slots, sizes)]))
    assert out.untouched_around()
    decoded = Guarded(tuple(x.shape), dtype)
    gpu.decode_slices(slots.to(DEVICE), fmt, rows, decoded.tensor)
    assert_same_bits(decoded.tensor.cpu(), expected)
    assert decoded.untouched_around()


def check_sum_encode(fmt: Format, ranks: int, rows: tuple[int, ...], hidden: int, dtype: torch.dtype, seed: int = 0):
    """Slices of the sum of the ranks' tensors, in one launch; and each slice as the sum of two messages of its own."""
    parts = torch.stack([tensor((sum(rows), hidden), dtype, fmt.block, seed + rank) for rank in range(ranks)])
    sizes = [message.layout(fmt, count, hidden).nbytes for count in rows]
    out, expected = Guarded((sum(sizes),), torch.uint8), torch.empty(sum(sizes), dtype=torch.uint8)
    gpu.sum_encode(parts.to(DEVICE), fmt, rows, out.tensor)
    reference.sum_encode(parts, fmt, rows, expected)
    assert torch.equal(out.tensor.cpu(), expected), f"{fmt} {rows} of {ranks} {dtype}"
    assert out.untouched_around()
    slots = torch.full((2 * len(rows), max(sizes)), 0xFF, dtype=torch.uint8)
    for slot, sent in zip(slots[::2], expected.split(sizes)):
        slot[: len(sent)] = sent
    slots[1::2] = slots[::2].roll(1, 1)  # any bytes are a message of something
    decoded, total = Guarded((sum(rows), hidden), dtype), torch.empty(sum(rows), hidden, dtype=dtype)
    gpu.decode_slices(slots.to(DEVICE), fmt, rows, decoded.tensor, 2)
    reference.decode_slices(slots, fmt, rows, total, 2)
    assert_same_bits(decoded.tensor.cpu(), total)
    assert decoded.untouched_around()


def check_decode_sum_encode(fmt: Format, messages: torch.Tensor, shape: tuple[int, int], second: Format) -> None:
    nbytes = message.layout(second, *shape).nbytes
    out = Guarded((nbytes,), torch.uint8)
    gpu.decode_sum_encode(messages, shape, fmt, second, out.tensor)
    expected = torch.empty(nbytes, dtype=torch.uint8)
    reference.decode_sum_encode(messages.cpu(), shape, fmt, second, expected)
    _compare_messages(out, expected, second, shape)


def _compare_messages(out: Guarded, expected: torch.Tensor, fmt: Format, shape: tuple[int, int]) -> None:
    found = out.tensor.cpu()
    differ = (found != expected).nonzero().flatten().tolist()
    assert not differ, f"{fmt} {tuple(shape)}: {len(differ)} bytes differ; " + "; ".join(
        f"{_place(at, fmt, shape)} is {found[at]:#04x}, not {expected[at]:#04x}" for at in differ[:3]
    )
    assert out.untouched_around()


def _place(at: int, fmt: Format, shape: tuple[int, int]) -> str:
    for field, sections in message.layout(fmt, *shape).fields.items():
        for section in sections:
            if section.offset <= at < section.end:
                row, byte = divmod(at - section.offset, section.row_bytes)
                where = f"row {row} byte {byte}" if row < section.rows else "padding"
                return f"{field} from bit {section.shift} up, {where},"
    return f"byte {at}"
