# SPDX-License-Identifier: Apache-2.0
"""Which code encodes and decodes on a device. All backends write the same bytes and sum to the same bits.

A backend is a module with the six functions of `reference.py`, which see tensors `[rows, hidden]` of at least one
element and fill all of `out`, which is contiguous:

    encode(x, fmt, out)                                     decode_sum(messages, fmt, out)
    encode_slices(x, fmt, rows, out)                        decode_slices(slots, fmt, rows, out, each)
    sum_encode(parts, fmt, rows, out)                       decode_sum_encode(messages, shape, fmt, second, out)

Slices are consecutive rows; `rows` is a tuple that says how many each has. A backend whose compiler runs at the first
call of each kind has `warm_up`, too.
"""

import os
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch

from ..notices import notice
from . import native, reference
from .formats import Format

# The environment variable that overrides the choice, for measurements and for finding faults.
OVERRIDE = "MEGATRON_COMP_BACKEND"
# By name: the types of devices that a backend serves, the fastest one of a type first.
DEVICES = {"triton": ("cuda",), "native": ("cpu",), "reference": ("cuda", "cpu")}


@lru_cache
def choose_backend(device_type: str) -> ModuleType:
    """The fastest backend for tensors on this type of device, or the one that the environment asks for.

    Raises ValueError for an override that names none or one that cannot serve the device.
    """
    able = available(device_type)
    if name := os.environ.get(OVERRIDE):
        if name not in able:
            raise ValueError(f"{OVERRIDE}={name!r}: allowed on {device_type} are {', '.join(able)}")
        return able[name]
    name, backend = next(iter(able.items()))
    if name == "reference":
        _warn_of_slow_codecs(device_type)
    return backend


@dataclass(frozen=True)
class SumKind:
    """What decides which kernels run in sums of `[..., hidden]` tensors.

    first, second: formats of the two steps of `two_step`; `gather_sum` and `reduce_scatter` have only the first.
    algorithm, ranks: of the flat sum; of a hierarchical one, those across islands.
    mates, shares: of a hierarchical sum, the ranks of this rank's island, and of the smallest one.
    """

    first: Format
    second: Format
    dtype: torch.dtype
    hidden: int
    ranks: int
    algorithm: str
    mates: int = 1
    shares: int = 1


def warm_up(kind: SumKind, device: torch.device) -> None:
    """Has everything compiled that sums of this kind need on this device.

    Does nothing where nothing is compiled later. Raises RuntimeError that says what to install if a compiler fails.
    """
    backend = choose_backend(device.type)
    if not hasattr(backend, "warm_up"):
        return
    try:
        backend.warm_up(kind, device)
    except Exception as error:
        raise RuntimeError(
            f"the kernels of codec {kind.first} cannot be compiled for {device}: {type(error).__name__}: {error}. "
            "Triton needs a C compiler (gcc or clang on PATH, or CC) and Python's headers (the package python3-dev); "
            f"{OVERRIDE}=reference runs slowly without them"
        ) from error


@lru_cache
def available(device_type: str) -> dict[str, ModuleType]:
    """Every backend that can run here for tensors on this type of device, by name, the fastest first."""
    serving = [name for name, types in DEVICES.items() if device_type in types or name == "reference"]
    return {name: backend for name in serving if (backend := _load(name)) is not None}


def _load(name: str) -> ModuleType | None:
    """The backend's module; None without the compiler or library that it needs."""
    if name == "triton":
        try:
            return import_module(".gpu", __package__)
        except ImportError:
            return None
    if name == "native":
        return native if native.compiler() else None
    return reference


@lru_cache
def _warn_of_slow_codecs(device_type: str) -> None:
    if device_type == "cpu":
        tried = os.environ.get("CC") or ", ".join(native.COMPILERS)
        why = f"no C compiler was found (tried {tried}); install one or set CC"
    elif device_type == "cuda":
        why = "Triton 3.6 or newer cannot be imported; install it"
    else:
        why = f"there are no fast ones for {device_type}"
    notice(f"codecs run in plain torch, 7 to 24 times slower: {why}")
