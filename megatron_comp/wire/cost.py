"""What each algorithm moves and how long it is predicted to take, from things that are the same on all ranks."""

import math
from collections.abc import Sequence

from .codec import Codec, CodecPair

ALGORITHMS = ("auto", "gather_sum", "two_step")

# What `auto` assumes of a link that nobody has measured: 25 Gbit/s each way, 50 us for a phase to start.
DEFAULT_LATENCY_S = 50e-6
DEFAULT_BYTES_PER_S = 25e9 / 8


def choose_algorithm(shape: Sequence[int], codec: Codec | CodecPair, ranks: int, algorithm: str = "auto") -> str:
    """`algorithm`, or for `auto` the one that is predicted faster from things that are equal on all ranks."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {algorithm!r}; known are {', '.join(ALGORITHMS)}")
    if isinstance(codec, CodecPair):
        if algorithm == "gather_sum":
            raise ValueError(f"gather_sum has one phase and takes one codec, not {codec}")
        return "two_step"
    if algorithm != "auto":
        return algorithm

    def seconds(name: str, phases: int) -> float:
        received = max(received_bytes(shape, codec, ranks, name, rank) for rank in (0, ranks - 1))
        return phases * DEFAULT_LATENCY_S + received / DEFAULT_BYTES_PER_S

    return "two_step" if seconds("two_step", 2) < seconds("gather_sum", 1) else "gather_sum"


def received_bytes(shape: Sequence[int], codec: Codec | CodecPair, ranks: int, algorithm: str, rank: int) -> int:
    """Bytes that `rank` receives from the others in one `all_reduce` of `shape`, to the byte."""
    if ranks == 1 or 0 in shape:
        return 0
    if algorithm == "gather_sum":
        return (ranks - 1) * codec.message_bytes(shape)
    first, second = step_codecs(codec)
    rows, hidden = slice_rows(shape, ranks), shape[-1]
    return (ranks - 1) * (first.message_bytes((rows[rank], hidden)) + second.message_bytes((rows[0], hidden)))


def received_bytes_scatter(
    shape: Sequence[int], codec: Codec, ranks: int, rank: int, splits: Sequence[int] | None = None
) -> int:
    """Bytes that `rank` receives from the others in one `reduce_scatter` of `shape`."""
    if ranks == 1 or 0 in shape:
        return 0
    return (ranks - 1) * codec.message_bytes((scatter_rows(shape, ranks, splits)[rank], *shape[1:]))


def ring_bytes(nbytes: int, ranks: int, passes: int = 2) -> int:
    """Bytes each rank receives in a ring over a tensor of `nbytes`: all-reduce takes 2 passes, reduce-scatter 1."""
    return passes * (ranks - 1) * nbytes // ranks


def step_codecs(codec: Codec | CodecPair) -> tuple[Codec, Codec]:
    """The codecs of the two phases of a two-step sum."""
    return (codec.first, codec.second) if isinstance(codec, CodecPair) else (codec, codec)


def slice_rows(shape: Sequence[int], ranks: int) -> list[int]:
    """How many rows each rank owns in the two-step sum: as even as can be, longer slices first."""
    rows = math.prod(shape[:-1])
    return [rows // ranks + (rank < rows % ranks) for rank in range(ranks)]


def scatter_rows(shape: Sequence[int], ranks: int, splits: Sequence[int] | None = None) -> list[int]:
    """How many of dim 0's rows each rank gets of a reduce-scatter: `splits`, or equal shares.

    Raises ValueError if there are no such shares, or if the splits do not make up dim 0.
    """
    if len(shape) < 2:
        raise ValueError(f"reduce_scatter needs [rows, ..., hidden], not {tuple(shape)}")
    if splits is None and shape[0] % ranks:
        raise ValueError(
            f"reduce_scatter needs [rows, ..., hidden] with rows divisible by {ranks}, or splits, not {tuple(shape)}"
        )
    splits = [shape[0] // ranks] * ranks if splits is None else list(splits)
    if len(splits) != ranks or sum(splits) != shape[0] or min(splits) < 0:
        raise ValueError(f"reduce_scatter over {ranks} ranks: splits {splits} do not make up {shape[0]} rows")
    return splits
