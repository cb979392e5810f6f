# SPDX-License-Identifier: Apache-2.0
"""What others have for the same job, on the same buffers: MX casts.

A peer offers some of a backend's functions for some formats, and passes the same check of bytes before it is timed.
"""

import logging
import sys

import torch
from tqdm import tqdm

from ..wire.formats import Format, Minifloat
from ..wire.message import layout
from ..wire.scales import lookup, minifloat_codes, table

BLOCK = 32
MX_FORMATS = tuple(Format.parse(name) for name in ("mxfp4", "mxfp8"))


class TorchCompile:
    """Plain torch, as one would write MX for finite values down, compiled."""

    def __init__(self, _device: torch.device) -> None:
        self._encode = torch.compile(_encode, fullgraph=True, dynamic=False)
        self._decode_sum = torch.compile(_decode_sum, fullgraph=True, dynamic=False)

    def encode(self, x: torch.Tensor, fmt: Format, out: torch.Tensor) -> None:
        self._encode(x, fmt.element, *_sections(out, fmt, x.shape))

    def decode_sum(self, messages: torch.Tensor, fmt: Format, out: torch.Tensor) -> None:
        values = table(fmt.element.table, out.device)
        self._decode_sum([_sections(message, fmt, out.shape) for message in messages], values, out)


class Torchao:
    """torchao's `to_mx`, and the copy of its two tensors to their places in a message.

    Compiled as one on a GPU; eager on a CPU, where torch.compile does not know the type of its scales.
    """

    def __init__(self, device: torch.device) -> None:
        from torchao.prototype.mx_formats.mx_tensor import to_mx

        elements = {"fp4_e2m1": torch.float4_e2m1fn_x2, "fp8_e4m3": torch.float8_e4m3fn}

        def encode(x: torch.Tensor, name: str, payload: torch.Tensor, scale: torch.Tensor) -> None:
            scales, codes = to_mx(x, elements[name], BLOCK)
            payload.copy_(codes.view(torch.uint8))
            scale.copy_(scales.view(torch.uint8))

        compiled = device.type == "cuda"
        self._encode = torch.compile(encode, fullgraph=True, dynamic=False) if compiled else encode

    def encode(self, x: torch.Tensor, fmt: Format, out: torch.Tensor) -> None:
        self._encode(x, fmt.element.name, *_sections(out, fmt, x.shape))


PEERS = {"torch.compile": TorchCompile, "torchao": Torchao}


def load(device: torch.device) -> dict[str, object]:
    """The peers that this machine has, by name; a line on standard error for each that it lacks."""
    logging.getLogger("torch").setLevel(logging.CRITICAL + 1)  # of what does not compile it prints hundreds of lines
    made = {}
    for name, peer in PEERS.items():
        try:
            made[name] = peer(device)
        except Exception as error:
            no_row(name, error)
    return made


def no_row(peer: str, error: Exception) -> None:
    """Says in one line why a peer is left out."""
    reason = next(iter(str(error).splitlines()), "")
    tqdm.write(f"bench codec: no row for peer {peer}: {type(error).__name__}: {reason}", file=sys.stderr)


def _sections(message: torch.Tensor, fmt: Format, shape: torch.Size) -> list[torch.Tensor]:
    """uint8 payload `[rows, hidden * bits / 8]` and scales `[rows, hidden / 32]`, inside the message."""
    return [section.view(message) for (section,) in layout(fmt, *shape).fields.values()]


def _encode(x: torch.Tensor, element: Minifloat, payload: torch.Tensor, scale: torch.Tensor) -> None:
    blocks = x.float().view(x.shape[0], -1, BLOCK)
    exponent = (blocks.abs().amax(-1).view(torch.int32) >> 23) - element.max_exponent
    scaled = blocks * ((254 - exponent) << 23).view(torch.float32)[..., None]
    if element.bits == 8:
        codes = scaled.clamp(-element.max_value, element.max_value).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        codes = minifloat_codes(scaled.abs(), element) | (scaled.view(torch.int32) >> 28 & 8)
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    payload.copy_(codes.reshape(payload.shape))
    scale.copy_(exponent)


def _decode_sum(messages: list[list[torch.Tensor]], values: torch.Tensor, out: torch.Tensor) -> None:
    total = None
    for payload, scale in messages:
        if len(values) == 16:
            codes = torch.stack((payload & 15, payload >> 4), dim=-1).flatten(1)
            decoded = lookup(codes, values)
        else:
            decoded = payload.view(torch.float8_e4m3fn).float()
        decoded = decoded.view(out.shape[0], -1, BLOCK) * (scale.int() << 23).view(torch.float32)[..., None]
        total = decoded if total is None else total + decoded
    out.copy_(total.view(out.shape))
