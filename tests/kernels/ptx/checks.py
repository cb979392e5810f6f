# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels against `wire/reference.py`: cases, and one check for each operation.

A case is a codec, an operation, a shape and a type of number. Tensors are those of `kernel_cases`: every block is of
one kind, ties, subnormals, NaN and infinities among them.
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))  # where kernel_cases is

import kernel_cases  # noqa: E402
from device import Device  # noqa: E402

from megatron_comp.kernels.format import TILE  # noqa: E402
from megatron_comp.wire import gpu, message, reference  # noqa: E402
from megatron_comp.wire.formats import (  # noqa: E402
    BLOCK_SIZES,
    ELEMENTS,
    FLAGS,
    PRESETS,
    ROUNDING_RULES,
    SCALES,
    Format,
)

RANKS = 3
DTYPES = kernel_cases.DTYPES


@dataclass(frozen=True)
class Case:
    operation: str
    codec: str
    shape: tuple[int, int]
    dtype: str
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.operation} {self.codec} {list(self.shape)} {self.dtype}"

    def check(self, device: Device) -> None:
        OPERATIONS[self.operation](device, Format.parse(self.codec), self.shape, DTYPES[self.dtype], self.seed)


# Operations. Outputs hold 0xFF before, which as a float is NaN.


def check_encode(device, fmt, shape, dtype, seed) -> None:
    x = kernel_cases.tensor(shape, dtype, fmt.block, seed)
    found, expected = _messages(fmt, shape)
    device.run(lambda: gpu.encode(x, fmt, found), [x], [found])
    reference.encode(x, fmt, expected)
    _compare(found, expected)


def check_decode_sum(device, fmt, shape, dtype, seed) -> None:
    messages = _encoded(fmt, shape, dtype, seed)
    found, expected = torch.full(shape, torch.nan, dtype=dtype), torch.empty(shape, dtype=dtype)
    device.run(lambda: gpu.decode_sum(messages, fmt, found), [messages], [found])
    reference.decode_sum(messages, fmt, expected)
    kernel_cases.assert_same_bits(found, expected)


def check_decode_sum_encode(device, fmt, shape, dtype, seed) -> None:
    messages = _encoded(fmt, shape, dtype, seed)
    found, expected = _messages(fmt, shape)
    device.run(lambda: gpu.decode_sum_encode(messages, shape, fmt, fmt, found), [messages], [found])
    reference.decode_sum_encode(messages, shape, fmt, fmt, expected)
    _compare(found, expected)


def check_slices(device, fmt, shape, dtype, seed) -> None:
    """All slices in one launch; what messages leave of their slots is never read. Of the shape only `hidden` counts."""
    rows, hidden = SLICES[seed % len(SLICES)], shape[1]
    x = kernel_cases.tensor((sum(rows), hidden), dtype, fmt.block, seed)
    sizes = [message.layout(fmt, count, hidden).nbytes for count in rows]
    slots, found = torch.full((len(rows), max(sizes)), 0xFF, dtype=torch.uint8), _filled(sum(sizes))
    decoded, expected = torch.full(x.shape, torch.nan, dtype=dtype), torch.empty(x.shape)
    for part, slot, size, total in zip(x.split(rows), slots, sizes, expected.split(rows)):
        if len(part):
            reference.encode(part, fmt, slot[:size])
            reference.decode_sum(slot[None, :size], fmt, total)
    device.run(lambda: gpu.encode_slices(x, fmt, rows, found), [x], [found])
    _compare(found, torch.cat([slot[:size] for slot, size in zip(slots, sizes)]))
    device.run(lambda: gpu.decode_slices(slots, fmt, rows, decoded), [slots], [decoded])
    # Rounded from fp32: as the message of a sum it may be infinite in half precision.
    kernel_cases.assert_same_bits(decoded, expected.to(dtype))


def check_every_value(device, fmt, shape, dtype, seed) -> None:
    """Encodes all finite values of a 16-bit type that blocks with the largest value 1.5 * 2^e can have; a few e.

    The shape does not count.
    """
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    smallest = torch.finfo(dtype).tiny
    blocks = []
    for largest in (1.5 * smallest, 3 * smallest, 6 * smallest, 12 * smallest, 1.5, torch.finfo(dtype).max / 1.34):
        inside = values[values.abs() <= largest]
        inside = torch.nn.functional.pad(inside, (0, -len(inside) % (fmt.block - 1))).view(-1, fmt.block - 1)
        blocks.append(torch.nn.functional.pad(inside, (1, 0), value=largest))
    x = torch.cat(blocks).view(1, -1)
    found, expected = _messages(fmt, x.shape)
    device.run(lambda: gpu.encode(x, fmt, found), [x], [found])
    reference.encode(x, fmt, expected)
    _compare(found, expected)


def check_far(device, fmt, shape, dtype, seed, slices=1) -> None:
    """More than 2^31 values: the blocks of the first and of the last row, encoded and decoded.

    The system gives memory when it is first used, so that the tensors cost what these two rows touch.
    """
    rows, hidden = shape
    ends = kernel_cases.tensor((2, hidden), dtype, fmt.block, seed)
    x, found = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    x[0], x[-1] = ends
    layout = message.layout(fmt, rows // slices, hidden)
    messages, expected = torch.empty(slices, layout.nbytes, dtype=torch.uint8), torch.empty_like(ends)
    counts, tiles = [rows // slices] * slices, -(-hidden // TILE)
    blocks = [*range(tiles), *range(-tiles, 0)]
    device.run(lambda: gpu.encode_slices(x, fmt, counts, messages.view(-1)), [x], [messages], blocks)
    device.run(lambda: gpu.decode_slices(messages, fmt, counts, found), [messages], [found], blocks)
    of_ends = torch.empty(message.layout(fmt, *ends.shape).nbytes, dtype=torch.uint8)
    reference.encode(ends, fmt, of_ends)
    for field, sections in message.layout(fmt, *ends.shape).fields.items():
        for section, whole in zip(sections, layout.fields[field]):
            its_ends = torch.cat([whole.view(messages[0])[0], whole.view(messages[-1])[-1]])
            _compare(its_ends, section.view(of_ends).flatten())
    reference.decode_sum(of_ends[None], fmt, expected)
    kernel_cases.assert_same_bits(found[[0, -1]], expected)


def check_sum_encode(device, fmt, shape, dtype, seed) -> None:
    """In two slices of a sum over the ranks, decoded as sums of as many messages."""
    parts = torch.stack([kernel_cases.tensor(shape, dtype, fmt.block, seed + r) for r in range(RANKS)])
    rows, hidden = (shape[0] - shape[0] // 2, shape[0] // 2), shape[1]
    sizes = [message.layout(fmt, count, hidden).nbytes for count in rows]
    found, expected = _filled(sum(sizes)), _filled(sum(sizes))
    device.run(lambda: gpu.sum_encode(parts, fmt, rows, found), [parts], [found])
    reference.sum_encode(parts, fmt, rows, expected)
    _compare(found, expected)
    slots = torch.full((len(rows), RANKS, max(sizes)), 0xFF, dtype=torch.uint8)
    for of_slice, sent in zip(slots, expected.split(sizes)):
        of_slice[:, : len(sent)] = sent
    slots = slots.flatten(0, 1)
    decoded, total = torch.full(shape, torch.nan, dtype=dtype), torch.empty(shape, dtype=dtype)
    device.run(lambda: gpu.decode_slices(slots, fmt, rows, decoded, RANKS), [slots], [decoded])
    reference.decode_slices(slots, fmt, rows, total, RANKS)
    kernel_cases.assert_same_bits(decoded, total)


OPERATIONS = {
    "encode": check_encode,
    "decode_sum": check_decode_sum,
    "decode_sum_encode": check_decode_sum_encode,
    "slices": check_slices,
    "sum_encode": check_sum_encode,
    "every value": check_every_value,
    "far": check_far,
    "far slices": partial(check_far, slices=2),
}
IN_TURN = list(OPERATIONS)[:4]
# Rows of each slice: long ones before short ones, none in the end, none first.
SLICES = [(2, 2, 1), (1, 1, 1, 0, 0), (0, 3, 1)]
# Rows of 16384 values are taken as one long row; longer by 8, they are no number of whole blocks, and stay rows.
FAR = [Case(how, "int8:32:fp32", (140_002, 16_384 + more), "bf16") for how in ("far", "far slices") for more in (0, 8)]
# Rows with a scale of their own that are too long for one tile.
LONG = [Case(how, "nvfp4", (2, 16_384 + 33), "bf16") for how in ("encode", "decode_sum_encode", "sum_encode")]


def _filled(nbytes):
    return torch.full((nbytes,), 0xFF, dtype=torch.uint8)


def _messages(fmt, shape):
    nbytes = message.layout(fmt, *shape).nbytes
    return _filled(nbytes), torch.empty(nbytes, dtype=torch.uint8)


def _encoded(fmt, shape, dtype, seed):
    return kernel_cases.encoded(fmt, [kernel_cases.tensor(shape, dtype, fmt.block, seed + r) for r in range(RANKS)])


def _compare(found, expected) -> None:
    differ = (found != expected).nonzero().flatten().tolist()
    assert not differ, f"{len(differ)} of {len(expected)} bytes differ: " + "; ".join(
        f"byte {at} is {found[at]:#04x}, not {expected[at]:#04x}" for at in differ[:3]
    )


# Sets of cases.


def whole_matrix() -> list[Case]:
    """The codecs of `kernel_cases.MIXED` in every way, and each other codec in one, in turn.

    A way is left out where another one launches the same kernels: the middle of a sum knows no type of number, slices
    are launched by the kernels of whole tensors, and their rows are their own. In both, the types take turns.
    """
    cases = [*FAR, *LONG]
    for codec in kernel_cases.MIXED:
        shapes = [*kernel_cases.shapes(Format.parse(codec)).values(), (1, 4096), (4, 4096)]
        combinations = itertools.product(("encode", "decode_sum"), shapes, DTYPES)
        turns = [("decode_sum_encode", shape) for shape in shapes]
        turns += [("slices", shape) for shape in {shape[1]: shape for shape in shapes}.values()]
        combinations = [*combinations, *((*turn, dtype) for turn, dtype in zip(turns, itertools.cycle(DTYPES)))]
        cases += [Case(*way[:1], codec, *way[1:], seed) for seed, way in enumerate(combinations)]
        cases += [Case("every value", codec, (1, 0), dtype) for dtype in ("bf16", "fp16")]
    return cases + list(in_turn(kernel_cases.PLAIN + kernel_cases.OPTIONS, 1))


def every_shape() -> list[Case]:
    shapes = kernel_cases.shapes(Format.parse("mxfp4")).values()
    by_level = [Case("sum_encode", "mxfp4", (3, 1023), "bf16"), Case("sum_encode", "nvfp4", (3, 64), "bf16")]
    every_value = [Case("every value", "mxfp4", (1, 0), dtype) for dtype in ("bf16", "fp16")]
    in_turn = (Case(op, "mxfp4", shape, "bf16") for op in IN_TURN for shape in shapes)
    return [*in_turn, *by_level, *every_value, *FAR, *LONG]


# What the test suite runs.
SUITE = {
    "shapes": every_shape,
    "presets": lambda: list(in_turn([*PRESETS], len(IN_TURN))),
    "options": lambda: list(in_turn(covering()[len(PRESETS) :], 2)),
}


def in_turn(codecs: list[str], operations: int) -> Iterator[Case]:
    """So many operations of each codec; shapes and types take turns so that each meets every operation."""
    for number, codec in enumerate(codecs):
        shapes = [*kernel_cases.shapes(Format.parse(codec)).values()]
        for i in range(operations):
            turn = number + i
            shape, dtype = shapes[(number + 3 * i) % len(shapes)], [*DTYPES][(number // 3 + i) % 3]
            yield Case(IN_TURN[turn % len(IN_TURN)], codec, shape, dtype, number)


def covering() -> list[str]:
    """All presets, and of other codecs as few as hold every element, block size, scale, rule and option.

    One with `search` is taken only once: its kernels take up to 15 s to compile.
    """
    missing = {*ELEMENTS, *map(str, BLOCK_SIZES), *SCALES, *ROUNDING_RULES, *FLAGS}
    chosen = list(PRESETS)
    for preset in PRESETS.values():
        missing -= {*preset.split(":")}
    while missing:
        codecs = [
            codec for codec in kernel_cases.PLAIN + kernel_cases.OPTIONS if "search" in missing or "search" not in codec
        ]
        best = max(codecs, key=lambda codec: len(missing & {*codec.split(":")}))
        if not missing & {*best.split(":")}:
            raise AssertionError(f"no codec has {missing}")
        chosen.append(best)
        missing -= {*best.split(":")}
    return chosen
