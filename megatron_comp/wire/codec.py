# SPDX-License-Identifier: Apache-2.0
"""`Codec`: a format name made into encode and decode, by the backend that serves the tensor's device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..files import shown
from . import message
from .backends import choose_backend
from .formats import Format

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Codec:
    """Encodes `[..., hidden]` tensors into bytes, block by block along the hidden dimension."""

    format: Format

    @classmethod
    def parse(cls, text: str) -> "Codec":
        """From `element:block:scale[:option...]` or a preset's name. Raises ValueError that names the wrong part."""
        return cls(Format.parse(text))

    def __str__(self) -> str:
        return str(self.format)

    @property
    def bits_per_value(self) -> float:
        """Bits sent a value in whole blocks of a long row: payload, scale, zero point, spikes.

        A row scale adds 32 bits per row, and short blocks and section padding their share: `message_bytes` is exact.
        """
        a_block = {"value": self.format.block, "block": 1, "spike": 2, "row": 0}
        bits = sum(a_block[unit] * width for unit, width in message.field_widths(self.format).values())
        return bits / self.format.block

    def message_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of the message of a tensor of this shape."""
        return message.layout(self.format, *_rows_and_hidden(shape)).nbytes

    def encode(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """`[..., hidden]` of fp32, bf16 or fp16, strided or not, to a uint8 `[message_bytes(x.shape)]`.

        out: where the message goes, contiguous; without it a new tensor.
        """
        _check_encodes(x)
        rows_and_hidden = _rows_and_hidden(x.shape)
        out = _message(message.layout(self.format, *rows_and_hidden).nbytes, x.device, out)
        if x.numel():
            choose_backend(x.device.type).encode(x.detach().reshape(rows_and_hidden), self.format, out)
        return out

    def encode_slices(self, x: torch.Tensor, rows: Sequence[int], out: torch.Tensor | None = None) -> torch.Tensor:
        """The messages of consecutive slices of `x` `[rows of all, hidden]`, one after another, as one uint8 tensor.

        rows: of each slice; a slice without rows has a message of no bytes. out: as in `encode`.
        Raises ValueError if the slices do not make up `x`.
        """
        _check_encodes(x)
        rows = tuple(rows)
        out = _message(sum(self._slice_bytes(rows, x)), x.device, out)
        if x.numel():
            choose_backend(x.device.type).encode_slices(x.detach(), self.format, rows, out)
        return out

    def sum_encode(self, parts: torch.Tensor, rows: Sequence[int], out: torch.Tensor | None = None) -> torch.Tensor:
        """`encode_slices` of the fp32 sum of `parts` `[ranks, rows of all, hidden]`, which is kept nowhere.

        Added up in rank order, each value as it is. Raises what `encode_slices` raises.
        """
        _check_encodes(parts)
        rows = tuple(rows)
        out = _message(sum(self._slice_bytes(rows, parts[0])), parts.device, out)
        if parts.numel():
            choose_backend(parts.device.type).sum_encode(parts, self.format, rows, out)
        return out

    def decode(self, message: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The reverse of `encode`: a tensor of `shape` and `dtype`."""
        return self.decode_sum(message.unsqueeze(0), shape, dtype)

    def decode_sum(
        self, messages: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """uint8 `[ranks, bytes]` to the sum of all ranks' tensors of `shape`: fp32 in rank order, rounded once.

        In fp16 a sum beyond +-65504 is infinite, as without codecs; one message alone saturates there.

        out: where the sum goes, contiguous, of `shape` and `dtype`; without it a new tensor.
        """
        rows_and_hidden = self._check(messages, shape, dtype)
        if out is None:
            out = torch.empty(tuple(shape), dtype=dtype, device=messages.device)
        assert out.dtype == dtype and out.shape == tuple(shape) and out.is_contiguous()
        if out.numel():
            choose_backend(messages.device.type).decode_sum(messages, self.format, out.view(rows_and_hidden))
        return out

    def decode_slices(self, slots: torch.Tensor, rows: Sequence[int], out: torch.Tensor, each: int = 1) -> torch.Tensor:
        """Messages of consecutive slices to all of their rows: contiguous `[rows, hidden]`.

        slots: uint8 `[slices * each, bytes]`, a message at the start of each; what follows it in its slot is not read.
        rows: of each slice. each: so many messages in turn are added up, in fp32 and in their order, to one slice.
        Unlike `decode` it does not saturate in fp16: a sum may be infinite.
        Raises ValueError if the slices do not make up `out`, or if a slot is too short for its message.
        """
        if out.dtype not in DTYPES:
            raise _no_such_output(out.dtype)
        rows = tuple(rows)
        longest = max(self._slice_bytes(rows, out), default=0)
        count = len(rows) * each
        if slots.dtype != torch.uint8 or slots.dim() != 2 or len(slots) != count or slots.shape[1] < longest:
            raise ValueError(
                f"{self} decodes slices of {rows} rows from {count} uint8 slots of at least {longest} bytes, "
                f"not from {slots.dtype} {tuple(slots.shape)}"
            )
        assert out.is_contiguous()
        if out.numel():
            choose_backend(slots.device.type).decode_slices(slots, self.format, rows, out, each)
        return out

    def decode_sum_encode(
        self, messages: torch.Tensor, shape: Sequence[int], second: "Codec", out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`second`'s message of the fp32 sum of all ranks' tensors of `shape`; the sum itself is kept nowhere.

        Where both codecs transform blocks of one size (`hadamard`), the sum is not transformed back in between.

        out: as in `encode`.
        """
        rows_and_hidden = self._check(messages, shape)
        out = _message(message.layout(second.format, *rows_and_hidden).nbytes, messages.device, out)
        if out.numel():
            backend = choose_backend(messages.device.type)
            backend.decode_sum_encode(messages, rows_and_hidden, self.format, second.format, out)
        return out

    def _slice_bytes(self, rows: tuple[int, ...], x: torch.Tensor) -> tuple[int, ...]:
        """Bytes of the message of each slice of `x`."""
        if x.dim() != 2 or sum(rows) != len(x) or min(rows, default=0) < 0:
            raise ValueError(f"slices of {rows} rows do not make up a tensor of {tuple(x.shape)}")
        return _slice_bytes(self.format, rows, x.shape[1])

    def _check(
        self, messages: torch.Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> tuple[int, int]:
        """Rows and hidden of `shape`, which is what the messages hold, and `dtype` what they can be decoded to."""
        if dtype not in DTYPES:
            raise _no_such_output(dtype)
        rows_and_hidden = _rows_and_hidden(shape)
        expected = message.layout(self.format, *rows_and_hidden).nbytes
        if messages.dtype != torch.uint8 or messages.dim() != 2 or messages.shape[1] != expected or not len(messages):
            raise ValueError(
                f"{self} decodes {tuple(shape)} from uint8 messages of {expected} bytes each, "
                f"not from {messages.dtype} {tuple(messages.shape)}"
            )
        return rows_and_hidden


@dataclass(frozen=True)
class CodecPair:
    """A codec for each phase of the two-step all-reduce, written `first>second`."""

    first: Codec
    second: Codec

    def __str__(self) -> str:
        return f"{self.first}>{self.second}"

    @property
    def bits_per_value(self) -> float:
        """The mean of both phases, which move equal numbers of values."""
        return (self.first.bits_per_value + self.second.bits_per_value) / 2


def parse_codec(text: str) -> Codec | CodecPair:
    """A codec's name, or two of them joined by `>`. Raises ValueError that names the wrong part."""
    if not isinstance(text, str):
        raise ValueError(f"a codec is named by a string such as 'mxfp4', not {shown(text)}")
    first, arrow, second = text.partition(">")
    return CodecPair(Codec.parse(first.strip()), Codec.parse(second.strip())) if arrow else Codec.parse(first.strip())


def one_codec(codec: Codec | CodecPair, algorithm: str) -> Codec:
    """The codec of an algorithm with one phase. Raises ValueError for two codecs."""
    if isinstance(codec, CodecPair):
        raise ValueError(f"{algorithm} has one phase and takes one codec, not {codec}")
    return codec


def _check_encodes(x: torch.Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"a codec encodes {', '.join(map(str, DTYPES))}, not {x.dtype}")


def _no_such_output(dtype: torch.dtype) -> TypeError:
    return TypeError(f"a codec decodes to {', '.join(map(str, DTYPES))}, not {dtype}")


def _message(nbytes: int, device: torch.device, out: torch.Tensor | None) -> torch.Tensor:
    """Room for a message: `out`, if it fits, or a new tensor."""
    if out is None:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    if out.dtype != torch.uint8 or out.shape != (nbytes,) or out.device != device or not out.is_contiguous():
        raise ValueError(
            f"the message goes to a contiguous uint8 ({nbytes},) on {device}, "
            f"not to {out.dtype} {tuple(out.shape)} with stride {out.stride()} on {out.device}"
        )
    return out


@lru_cache(maxsize=4096)
def _slice_bytes(fmt: Format, rows: tuple[int, ...], hidden: int) -> tuple[int, ...]:
    return tuple(message.layout(fmt, *_rows_and_hidden((count, hidden))).nbytes for count in rows)


def _rows_and_hidden(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) == 0 or shape[-1] < 1:
        raise ValueError(f"a codec needs a shape [..., hidden] with hidden >= 1, not {tuple(shape)}")
    return math.prod(shape[:-1]), shape[-1]
