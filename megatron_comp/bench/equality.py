# SPDX-License-Identifier: Apache-2.0
"""Before anything is timed: the same bytes, and sums of the same bits, as the reference, on the tensors to be timed."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from ..wire import reference
from ..wire.codec import Codec
from ..wire.formats import Format
from .timing import capture

# Tensors of more values are encoded by the reference on the device itself (tests hold it to equal bytes there):
# on a CPU it would take longer than everything else.
CPU_ORACLE_VALUES = 1 << 22


class WrongBytes(Exception):
    """A backend differs from the reference."""


def operations(backend: ModuleType, ranks: list[int]) -> list[tuple[str, int]]:
    """(op, number of messages) of all that a backend offers; a peer may offer less than the three."""
    each = {"encode": [1], "decode_sum": ranks, "decode_sum_encode": ranks}
    return [(op, count) for op, counts in each.items() if hasattr(backend, op) for count in counts]


def apply(backend: ModuleType, op: str, fmt: Format, given: torch.Tensor, shape: torch.Size, out: torch.Tensor) -> None:
    """`given`: the tensor `[rows, hidden]` for encode, else messages `[ranks, nbytes]`. Fills `out`."""
    if op == "decode_sum_encode":
        backend.decode_sum_encode(given, shape, fmt, fmt, out)
    else:
        getattr(backend, op)(given, fmt, out)


@dataclass(frozen=True)
class Truth:
    """What the reference makes of the partial sums `[ranks, rows, hidden]`: messages `[ranks, nbytes]`."""

    codec: Codec
    partials: torch.Tensor
    messages: torch.Tensor

    @classmethod
    def of(cls, codec: Codec, partials: torch.Tensor) -> "Truth":
        messages = partials.new_empty((len(partials), codec.message_bytes(partials.shape[1:])), dtype=torch.uint8)
        for partial, message in zip(partials, messages):
            reference.encode(partial, codec.format, message)
        return cls(codec, partials, messages)

    def turns(self, op: str, ranks: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Twice (given, expected), of different tensors."""
        if op == "encode":
            yield from zip(self.partials[:2], self.messages[:2])
            return
        for messages in (self.messages[:ranks], self.messages.roll(1, 0)[:ranks]):
            expected = torch.empty_like(self.partials[0] if op == "decode_sum" else self.messages[0])
            apply(reference, op, self.codec.format, messages, self.partials.shape[1:], expected)
            yield messages, expected


def check(name: str, backend: ModuleType, op: str, ranks: int, truth: Truth, device: torch.device) -> None:
    """Raises WrongBytes, or what the backend raises. `out` is poisoned before: what is not written shows.

    On a GPU twice: a plain call, and the replay of a CUDA graph of it after its input has changed.
    """
    if backend is reference and device.type == "cpu":
        return  # it is what the others are compared with
    shape = truth.partials.shape[1:]
    given = torch.empty_like(truth.partials[0] if op == "encode" else truth.messages[:ranks], device=device)
    out = torch.empty_like(truth.partials[0] if op == "decode_sum" else truth.messages[0], device=device)

    def call(_turn: int = 0) -> None:
        apply(backend, op, truth.codec.format, given, shape, out)

    def launches():
        yield "", call
        if device.type == "cuda":
            yield ", replayed in a CUDA graph", capture(call, [0]).replay

    for (how, launch), (value, expected) in zip(launches(), truth.turns(op, ranks)):
        given.copy_(value)
        out.view(torch.uint8).fill_(0xFF)
        launch()
        found, expected = (t.view(torch.uint8).flatten() for t in (out.to(expected.device), expected))
        if not torch.equal(found, expected):
            at = int((found != expected).nonzero()[0])
            raise WrongBytes(
                f"{truth.codec}, {op} (ranks {ranks}) of {list(shape)}, backend {name!r}{how}: first differing byte "
                f"is {at}, {found[at]:#04x} where the reference has {expected[at]:#04x}; nothing is timed"
            )
