# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: the C of the folder `c`, compiled with the machine's own C compiler at first use.

The library serves all formats; a format and the layout of its message travel to it as one structure of numbers.
`c_library.py` keeps it on disk: the next process only loads it.
"""

import ctypes
import math
import os
import platform
import shlex
import shutil
from functools import lru_cache
from pathlib import Path

import torch

from . import c_library, message, scales
from .formats import Format, Integer, Levels, Minifloat, PowerOfTwo, SmallFloatScale
from .reference import input_limit

SOURCE = Path(__file__).parent / "c" / "native.c"  # which includes all other files of its folder
COMPILERS = ("cc", "gcc", "clang")
# No fast math and no fused multiply-adds: results must be IEEE's. Traps and errno are what nobody reads here.
FLAGS = ["-std=gnu11", "-O3", "-march=native", "-shared", "-fPIC"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
if platform.machine() == "x86_64":
    # Where there are 512-bit vectors, compilers prefer 256: sums of 2 and 4 messages took 5 % longer so.
    FLAGS += ["-mprefer-vector-width=512"]


def encode(x: torch.Tensor, fmt: Format, out: torch.Tensor) -> None:
    """`[rows, hidden]` of fp32, bf16 or fp16 into `out`, a uint8 message."""
    sum_encode(x.unsqueeze(0), fmt, (len(x),), out)


def encode_slices(x: torch.Tensor, fmt: Format, rows: tuple[int, ...], out: torch.Tensor) -> None:
    """The messages of consecutive slices of `x`, so many rows each, one after another into `out`."""
    sum_encode(x.unsqueeze(0), fmt, rows, out)


def sum_encode(parts: torch.Tensor, fmt: Format, rows: tuple[int, ...], out: torch.Tensor) -> None:
    """The same of the fp32 sum of `parts` `[ranks, rows, hidden]`; only a tile of the sum exists at a time."""
    parts = parts.contiguous()
    codecs = _codecs(fmt, rows, parts.shape[2])
    where = parts.data_ptr(), _DTYPES[parts.dtype], len(parts)
    _check(_library().sum_encode(codecs, len(rows), *where, out.data_ptr()))


def decode_sum(messages: torch.Tensor, fmt: Format, out: torch.Tensor) -> None:
    """uint8 `[ranks, nbytes]` to the sum `out` `[rows, hidden]`: fp32, in rank order, rounded once to its dtype.

    One message alone saturates where `out` is fp16; a sum may become infinite.
    """
    messages = _rows_of_bytes(messages)
    codec = _codec(fmt, *out.shape)
    where = messages.data_ptr(), messages.stride(0), len(messages)
    _check(_library().decode_sum(codec, *where, out.data_ptr(), _DTYPES[out.dtype]))


def decode_slices(slots: torch.Tensor, fmt: Format, rows: tuple[int, ...], out: torch.Tensor, each: int = 1) -> None:
    """Messages, one at the start of each slot of uint8 `[slices * each, bytes]`, to the rows of `out`.

    Every slice is the sum of `each` messages, and does not saturate.
    """
    slots = _rows_of_bytes(slots)
    codecs = _codecs(fmt, rows, out.shape[1])
    where = slots.data_ptr(), slots.stride(0), each
    _check(_library().decode_slices(codecs, len(rows), *where, out.data_ptr(), _DTYPES[out.dtype]))


def decode_sum_encode(
    messages: torch.Tensor, shape: tuple[int, int], fmt: Format, second: Format, out: torch.Tensor
) -> None:
    """The fp32 sum of `messages`, `shape` = (rows, hidden), encoded again; only a tile of the sum exists at a time."""
    messages = _rows_of_bytes(messages)
    codecs = _codec(fmt, *shape), _codec(second, *shape)
    where = messages.data_ptr(), messages.stride(0), len(messages)
    _check(_library().decode_sum_encode(codecs[0], *where, codecs[1], out.data_ptr()))


def _rows_of_bytes(messages: torch.Tensor) -> torch.Tensor:
    """Any distance between messages will do, but each message's bytes must be neighbours."""
    return messages if messages.stride(1) == 1 else messages.contiguous()


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for a tile of values")


# A format with the layout of its message: the structures of codec.h, field by field.

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ELEMENT_KINDS = {Minifloat: 0, Integer: 1, Levels: 2}
_SCALE_KINDS = {"fp16": 2, "bf16": 3, "fp32": 4}  # 0 and 1: powers of two, small floats


class _Minifloat(ctypes.Structure):
    _fields_ = [
        ("mantissa_bits", ctypes.c_int32),
        ("smallest_normal", ctypes.c_uint32),
        ("max_code", ctypes.c_uint32),
        ("after_max", ctypes.c_uint32),
        ("max_value", ctypes.c_float),
    ]


class _Plane(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("offset", "row_bytes", "padding")),
        *((name, ctypes.c_int32) for name in ("shift", "width")),
    ]


class _Field(ctypes.Structure):
    _fields_ = [("planes", ctypes.c_int32), ("plane", _Plane * 3)]


class _Codec(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("nbytes", ctypes.c_int64),
        ("block", ctypes.c_int32),
        ("limit", ctypes.c_float),
        ("hadamard_factor", ctypes.c_float),
        ("asym", ctypes.c_int32),
        ("spike", ctypes.c_int32),
        ("element_kind", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("value", ctypes.c_float * 32),
        ("lowest", ctypes.c_float),
        ("highest", ctypes.c_float),
        ("element", _Minifloat),
        ("threshold", ctypes.c_float * 15),
        ("scale_kind", ctypes.c_int32),
        ("nan_code", ctypes.c_uint32),
        ("bias", ctypes.c_int32),
        ("max_exponent", ctypes.c_int32),
        ("largest_code", ctypes.c_int32),
        ("underflow_to_zero", ctypes.c_int32),
        ("round_up", ctypes.c_uint32),
        ("ceil_above", ctypes.c_uint32),
        ("max_value", ctypes.c_float),
        ("smallest", ctypes.c_float),
        ("largest", ctypes.c_float),
        ("small_float", _Minifloat),
        ("row_scaled", ctypes.c_int32),
        ("row_divisor", ctypes.c_float),
        ("smallest_row_scale", ctypes.c_float),
        ("candidates", ctypes.c_int32),
        ("candidate", ctypes.c_float * 8),
        *((name, _Field) for name in message.FIELDS),
    ]


@lru_cache(maxsize=4096)
def _codecs(fmt: Format, rows: tuple[int, ...], hidden: int) -> ctypes.Array:
    return (ctypes.POINTER(_Codec) * len(rows))(*(_codec(fmt, count, hidden) for count in rows))


@lru_cache(maxsize=4096)
def _codec(fmt: Format, rows: int, hidden: int):  # a pointer to a _Codec
    element, tried, layout = fmt.element, scales.candidates(fmt), message.layout(fmt, rows, hidden)
    codec = _Codec(rows, hidden, layout.nbytes, fmt.block, asym=fmt.asym, spike=fmt.spike, max_value=element.max_value)
    codec.limit = input_limit(fmt)
    codec.hadamard_factor = fmt.block**-0.5 if fmt.hadamard else 0.0
    codec.element_kind, codec.bits = _ELEMENT_KINDS[type(element)], element.bits
    if element.bits <= 5:
        codec.value = element.table
    if isinstance(element, Integer):
        codec.lowest, codec.highest = -element.max_value - fmt.asym, element.max_value
    elif isinstance(element, Levels):
        codec.threshold = element.thresholds
    else:
        codec.element = _minifloat(element)
    codec.candidates, codec.candidate = len(tried), tried
    _set_scale(codec, fmt)
    for name, sections in layout.fields.items():
        planes = [
            _Plane(s.offset, s.row_bytes, s.end - s.offset - s.rows * s.row_bytes, s.shift, s.width) for s in sections
        ]
        setattr(codec, name, _Field(len(planes), tuple(planes)))
    return ctypes.pointer(codec)


def _set_scale(codec: _Codec, fmt: Format) -> None:
    element, scale = fmt.element, fmt.scale
    codec.nan_code, codec.row_scaled = scale.nan_code, scale.row_scaled
    if isinstance(scale, PowerOfTwo):
        codec.scale_kind = 0
        codec.bias, codec.max_exponent = scale.bias, element.max_exponent
        codec.largest_code, codec.underflow_to_zero = scales.largest_code(fmt), scale.underflow_to_zero
        codec.round_up = 1 << (22 - element.mantissa_bits) if fmt.rule == "even" else 0
        fraction = math.ldexp(element.max_value, 23 - element.max_exponent)
        codec.ceil_above = (int(fraction) if fmt.rule == "ceil" else -1) & 0x7FFFFF
    elif isinstance(scale, SmallFloatScale):
        codec.scale_kind, codec.small_float = 1, _minifloat(scale.float)
        codec.row_divisor = scale.float.max_value * element.max_value
        codec.smallest_row_scale = scales.SMALLEST_ROW_SCALE
    else:
        codec.scale_kind, codec.smallest = _SCALE_KINDS[scale.name], scale.smallest
        codec.largest = scales.largest_scale(fmt)


def _minifloat(fmt: Minifloat) -> _Minifloat:
    after_max = 0x7F800000 if fmt.magnitude(fmt.max_code + 1) == math.inf else 0x7FC00000
    return _Minifloat(fmt.mantissa_bits, (128 - fmt.bias) << 23, fmt.max_code, after_max, fmt.max_value)


# The library.


@lru_cache
def compiler() -> tuple[str, ...] | None:
    """The command of this machine's C compiler: `CC` of the environment or, without it, the first of COMPILERS."""
    chosen = shlex.split(os.environ.get("CC", ""))
    for command in [chosen] if chosen else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return tuple(command)
    return None


@lru_cache
def _library() -> ctypes.CDLL:
    """Raises RuntimeError without a compiler, and what `c_library.load` raises."""
    command = compiler()
    if command is None:
        raise RuntimeError(f"no C compiler for {SOURCE.name}: set CC or install one of {', '.join(COMPILERS)}")
    loaded, pointer = c_library.load(SOURCE, command, FLAGS), ctypes.c_void_p
    messages = pointer, ctypes.c_int64, ctypes.c_int
    slices = pointer, ctypes.c_int
    loaded.sum_encode.argtypes = [*slices, pointer, ctypes.c_int, ctypes.c_int, pointer]
    loaded.decode_sum.argtypes = [pointer, *messages, pointer, ctypes.c_int]
    loaded.decode_slices.argtypes = [*slices, *messages, pointer, ctypes.c_int]
    loaded.decode_sum_encode.argtypes = [pointer, *messages, pointer, pointer]
    assert loaded.codec_size() == ctypes.sizeof(_Codec)
    return loaded
