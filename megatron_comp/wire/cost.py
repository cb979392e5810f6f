"""What each algorithm moves and how long it is predicted to take, from things that are the same on all ranks.

Predicted seconds of one sum of V values over N ranks (`Figures` holds the measured or assumed constants):

    stock        latency + ring bytes / rate
    gather_sum   wire: latency + received bytes / rate         codec: encode V, decode N V
    two_step     wire: the same, of all-to-all and all-gather  codec: encode V, decode V, encode V / N, decode V
    scatter      wire: of an all-to-all                        codec: encode V, decode V

A codec's fixed cost counts once per call of encode or decode in every chunk; one call serves all slices. Where messages
go in chunks, codec and wire overlap: n chunks hide (1 - 1/n) of the shorter of the two, times the figures' `hidden`.
That is 1 at best, a pipeline's; where codec and link share a processor, as over loopback, they hide less of each other.
So many chunks are taken as are predicted fastest, within what the message's size allows, or as many as that where
nothing was measured.
"""

import math
from collections.abc import Sequence

import torch

from . import exchange
from .codec import Codec, CodecPair
from .figures import ASSUMED, CodecCost, Figures

ALGORITHMS = ("auto", "gather_sum", "two_step")


def choose_algorithm(
    shape: Sequence[int],
    codec: Codec | CodecPair,
    ranks: int,
    algorithm: str = "auto",
    figures: Figures = ASSUMED,
) -> str:
    """`algorithm`, or for `auto` the one that is predicted faster from things that are equal on all ranks."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {algorithm!r}; known are {', '.join(ALGORITHMS)}")
    if isinstance(codec, CodecPair):
        if algorithm == "gather_sum":
            raise ValueError(f"gather_sum has one phase and takes one codec, not {codec}")
        return "two_step"
    if algorithm != "auto":
        return algorithm
    return min(ALGORITHMS[1:], key=lambda name: sum_seconds(shape, codec, ranks, name, figures))


def pays(
    shape: Sequence[int],
    itemsize: int,
    codec: Codec | CodecPair,
    ranks: int,
    algorithm: str = "auto",
    figures: Figures = ASSUMED,
    scatter: bool = False,
) -> bool:
    """Whether a compressed sum is predicted faster than the stock one, by the figures' margin.

    A tensor beyond the largest that was measured is judged as the largest is: a line that is drawn on from there would
    end in a gain where a loss was measured.

    itemsize: bytes per value of the stock sum. scatter: a reduce-scatter instead of an all-reduce.
    """
    beyond = ring_bytes(math.prod(shape) * itemsize, ranks) / figures.largest_bytes
    if beyond > 1:
        shape = (max(1, int(math.prod(shape[:-1]) / beyond)), shape[-1])
    stock = stock_seconds(math.prod(shape) * itemsize, ranks, figures, scatter)
    if scatter:
        return scatter_seconds(shape, codec, ranks, figures) * (1 + figures.margin) < stock
    algorithm = choose_algorithm(shape, codec, ranks, algorithm, figures)
    return sum_seconds(shape, codec, ranks, algorithm, figures) * (1 + figures.margin) < stock


def stock_seconds(nbytes: int, ranks: int, figures: Figures = ASSUMED, scatter: bool = False) -> float:
    """Of the stock all-reduce of a tensor of `nbytes`, or of the stock reduce-scatter."""
    if scatter:
        return figures.links["reduce_scatter"].seconds(ring_bytes(nbytes, ranks, 1))
    return figures.links["all_reduce"].seconds(ring_bytes(nbytes, ranks))


def sum_seconds(
    shape: Sequence[int], codec: Codec | CodecPair, ranks: int, algorithm: str, figures: Figures = ASSUMED
) -> float:
    """Of a compressed all-reduce by `gather_sum` or `two_step`, on the rank that it takes longest."""
    chunks = choose_chunks(shape, codec, ranks, algorithm, figures, figures.chunk_bytes)
    wire, work = wire_and_work(shape, codec, ranks, algorithm, figures, chunks)
    return wire + work - _hidden(wire, work, chunks, figures)


def choose_chunks(
    shape: Sequence[int],
    codec: Codec | CodecPair,
    ranks: int,
    algorithm: str,
    figures: Figures,
    chunk_bytes: int | None,
) -> int:
    """Into how many chunks, of a message of at least `chunk_bytes` each, a sum by `algorithm` goes; None: into one."""
    most = most_chunks(shape, codec, ranks, chunk_bytes) if chunk_bytes else 1
    if not figures.codecs:
        return most

    def seconds(chunks: int) -> float:
        wire, work = wire_and_work(shape, codec, ranks, algorithm, figures, chunks)
        return wire + work - _hidden(wire, work, chunks, figures)

    return min(range(1, most + 1), key=seconds)


def choose_parts(
    shape: Sequence[int], codec: Codec | CodecPair, ranks: int, algorithm: str, figures: Figures, device: torch.device
) -> int:
    """Into how many parts of its rows a sum goes whose layer computes meanwhile; 1 where that is not done.

    What computing hides of the wire comes on top of what is predicted here, of codec and wire alone.
    """
    return choose_chunks(shape, codec, ranks, algorithm, figures, exchange.overlap_bytes(device.type))


def most_chunks(shape: Sequence[int], codec: Codec | CodecPair, ranks: int, chunk_bytes: int) -> int:
    """Into how many chunks, of a message of at least `chunk_bytes` each, an all-reduce can go."""
    nbytes = max(each.message_bytes(shape) for each in step_codecs(codec))
    return exchange.most_chunks(math.prod(shape[:-1]), ranks, nbytes, chunk_bytes)


def _hidden(wire: float, work: float, chunks: int, figures: Figures) -> float:
    return figures.hidden * min(wire, work) * (1 - 1 / chunks)


def wire_and_work(
    shape: Sequence[int], codec: Codec | CodecPair, ranks: int, algorithm: str, figures: Figures, chunks: int
) -> tuple[float, float]:
    """Seconds on the wire, and those of the codec, of a sum by `gather_sum` or `two_step` in so many chunks."""
    values, gather = math.prod(shape), figures.links["all_gather"]
    first, second = (figures.cost(each) for each in step_codecs(codec))
    if algorithm == "gather_sum":
        wire = gather.seconds(received_bytes(shape, codec, ranks, algorithm, 0))
        work = _encode(first, values, chunks) + _decode(first, ranks * values, chunks)
    else:
        scattered, gathered = two_step_bytes(shape, codec, ranks)
        wire = figures.links["all_to_all"].seconds(scattered) + gather.seconds(gathered)
        work = _encode(first, values, chunks) + _decode(first, values, chunks)
        work += _encode(second, values / ranks, chunks) + _decode(second, values, chunks)
    return wire, work


def scatter_seconds(shape: Sequence[int], codec: Codec, ranks: int, figures: Figures = ASSUMED) -> float:
    """Of a compressed reduce-scatter into equal shares."""
    values, cost = math.prod(shape), figures.cost(codec)
    nbytes = codec.message_bytes(shape)
    wire = figures.links["all_to_all"].seconds((ranks - 1) / ranks * nbytes)
    of_bytes = figures.chunk_bytes
    chunks = exchange.most_chunks(math.prod(shape[:-1]) // ranks, 1, nbytes, of_bytes) if of_bytes else 1
    work = _encode(cost, values, chunks) + _decode(cost, values, chunks)
    return wire + work - _hidden(wire, work, chunks, figures)


def _encode(cost: CodecCost, values: float, calls: int = 1) -> float:
    return calls * cost.encode_fixed_s + values * cost.encode_s_per_value


def _decode(cost: CodecCost, values: float, calls: int = 1) -> float:
    return calls * cost.decode_fixed_s + values * cost.decode_s_per_value


def two_step_bytes(shape: Sequence[int], codec: Codec | CodecPair, ranks: int) -> tuple[int, int]:
    """What the rank with the longest slice receives in each of the two phases."""
    rows = (slice_rows(shape, ranks)[0], shape[-1])
    return tuple((ranks - 1) * each.message_bytes(rows) for each in step_codecs(codec))


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
