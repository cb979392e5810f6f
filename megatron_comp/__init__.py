# SPDX-License-Identifier: Apache-2.0
"""Compressed tensor-parallel communication for LLM inference on Megatron-Core."""

from importlib import import_module
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from .layers.apply import apply_compression, remove_compression, stats
    from .layers.meter import ModelStats
    from .layers.row_parallel import CompressedRowParallelLinear
    from .policy import CompressionPolicy
    from .wire.codec import Codec, CodecPair
    from .wire.collectives import all_reduce, reduce_scatter
    from .wire.topology import Islands, connect

# Read on first use: Megatron takes seconds to import, and codecs and policies do not need it.
_HOMES = {
    "Codec": "wire.codec",
    "CodecPair": "wire.codec",
    "CompressedRowParallelLinear": "layers.row_parallel",
    "CompressionPolicy": "policy",
    "Islands": "wire.topology",
    "ModelStats": "layers.meter",
    "all_reduce": "wire.collectives",
    "apply_compression": "layers.apply",
    "connect": "wire.topology",
    "reduce_scatter": "wire.collectives",
    "remove_compression": "layers.apply",
    "stats": "layers.apply",
}

__all__ = [
    "Codec",
    "CodecPair",
    "CompressedRowParallelLinear",
    "CompressionPolicy",
    "Islands",
    "ModelStats",
    "__version__",
    "all_reduce",
    "apply_compression",
    "connect",
    "reduce_scatter",
    "remove_compression",
    "stats",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "megatron":
            raise
        message = f"{__name__}.{name} needs Megatron-Core: pip install 'megatron-comp[megatron]'"
        raise ModuleNotFoundError(message, name=error.name) from error


def __dir__() -> list[str]:
    return __all__
