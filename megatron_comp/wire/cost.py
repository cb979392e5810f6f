# SPDX-License-Identifier: Apache-2.0
"""How long each algorithm is predicted to take, from things that are the same on all ranks.

Predicted seconds of one sum of V values over N ranks (`Calibration` holds the measured or assumed constants):

    stock        latency + ring bytes / rate
    gather_sum   wire: latency + received bytes / rate         codec: encode V, decode N V
    two_step     wire: the same, of all-to-all and all-gather  codec: encode V, decode V, encode V / N, decode V
    scatter      wire: of an all-to-all                        codec: encode V, decode V

A hierarchical sum over M islands of S shares (`topology.py`) adds an all-to-all of raw values inside the islands, and,
of an all-reduce, an all-gather of messages there; what lies in between is that of the flat algorithm among M ranks, of
V / S values:

    hierarchical, gather_sum across   encode V / S, decode M V
    hierarchical, two_step across     encode V / S, decode V / S, encode V / (M S), decode V
    hierarchical scatter              encode V / S, decode V / S

Adding up raw values is not counted.

A codec's fixed cost counts once per call of encode or decode in every chunk; one call serves all slices. Where messages
go in chunks, codec and wire overlap: n chunks hide (1 - 1/n) of the shorter of the two, times `Calibration.hidden`.
That is 1 at best, a pipeline's; where codec and link share a processor, as over loopback, they hide less of each other.
So many chunks are taken as are predicted fastest, within what the message's size allows, or as many as that where
nothing was measured.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from . import exchange
from .algorithms import ALGORITHMS, FLAT
from .calibration import ASSUMED, Calibration, CodecCost, Link
from .codec import Codec, CodecPair, one_codec
from .topology import Islands
from .traffic import flat_across, received_bytes, ring_bytes, share_slots, slice_rows, step_codecs, two_step_bytes


def choose_algorithm(
    shape: Sequence[int],
    codec: Codec | CodecPair,
    ranks: int,
    algorithm: str = "auto",
    calibration: Calibration = ASSUMED,
    islands: Islands | None = None,
) -> str:
    """`algorithm`, or for `auto` the one that is predicted faster from things that are equal on all ranks.

    islands: without them, and where there is one, or one rank in each, a hierarchical sum is the flat one that `auto`
    chooses.
    """
    _check(algorithm)
    if algorithm == "gather_sum":
        one_codec(codec, algorithm)
    two_levels = islands is not None and islands.have_two_levels
    if algorithm in FLAT or algorithm == "hierarchical" and two_levels:
        return algorithm
    able = ["two_step"] if isinstance(codec, CodecPair) else [*FLAT]
    if algorithm == "auto" and two_levels and calibration.inside:
        able.append("hierarchical")
    if len(able) == 1:
        return able[0]
    return min(able, key=lambda name: sum_seconds(shape, codec, ranks, name, calibration, islands))


def choose_scatter(
    shape: Sequence[int],
    codec: Codec,
    ranks: int,
    algorithm: str = "auto",
    calibration: Calibration = ASSUMED,
    islands: Islands | None = None,
) -> str:
    """`reduce_scatter`, or `hierarchical_scatter` where `algorithm` asks for it, or where `auto` predicts it faster.

    The latter only among islands of one size, which several ranks must have.
    """
    _check(algorithm)
    able = islands is not None and islands.have_two_levels and islands.are_equal
    if not able or algorithm in FLAT or algorithm == "auto" and not calibration.inside:
        return "reduce_scatter"
    if algorithm == "hierarchical":
        return "hierarchical_scatter"
    flat, by_level = (scatter_seconds(shape, codec, ranks, calibration, of) for of in (None, islands))
    return "hierarchical_scatter" if by_level < flat else "reduce_scatter"


def _check(algorithm: str) -> None:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {algorithm!r}; known are {', '.join(ALGORITHMS)}")


def pays(
    shape: Sequence[int],
    itemsize: int,
    codec: Codec | CodecPair,
    ranks: int,
    algorithm: str = "auto",
    calibration: Calibration = ASSUMED,
    scatter: bool = False,
    islands: Islands | None = None,
) -> bool:
    """Whether a compressed sum is predicted faster than the stock one, by the calibration's margin.

    A tensor beyond the largest that was measured is judged as the largest is: a line that is drawn on from there would
    end in a gain where a loss was measured.

    itemsize: bytes per value of the stock sum. scatter: a reduce-scatter instead of an all-reduce. islands: as in
    `choose_algorithm`.
    """
    beyond = ring_bytes(math.prod(shape) * itemsize, ranks) / calibration.largest_bytes
    if beyond > 1:
        shape = (max(1, int(math.prod(shape[:-1]) / beyond)), shape[-1])
    stock = stock_seconds(math.prod(shape) * itemsize, ranks, calibration, scatter)
    if scatter:
        one = one_codec(codec, "reduce_scatter")
        way = choose_scatter(shape, one, ranks, algorithm, calibration, islands)
        of_levels = islands if way == "hierarchical_scatter" else None
        return scatter_seconds(shape, one, ranks, calibration, of_levels) * (1 + calibration.margin) < stock
    algorithm = choose_algorithm(shape, codec, ranks, algorithm, calibration, islands)
    return sum_seconds(shape, codec, ranks, algorithm, calibration, islands) * (1 + calibration.margin) < stock


def stock_seconds(nbytes: int, ranks: int, calibration: Calibration = ASSUMED, scatter: bool = False) -> float:
    """Of the stock all-reduce of a tensor of `nbytes`, or of the stock reduce-scatter."""
    if scatter:
        return calibration.links["reduce_scatter"].seconds(ring_bytes(nbytes, ranks, 1))
    return calibration.links["all_reduce"].seconds(ring_bytes(nbytes, ranks))


def sum_seconds(
    shape: Sequence[int],
    codec: Codec | CodecPair,
    ranks: int,
    algorithm: str,
    calibration: Calibration = ASSUMED,
    islands: Islands | None = None,
) -> float:
    """Of a compressed all-reduce by a named algorithm, on the rank that it takes longest. islands: of `hierarchical`,
    which needs the calibration's links `inside` and `across`."""
    chunks = choose_chunks(shape, codec, ranks, algorithm, calibration, calibration.chunk_bytes, islands)
    wire, work = wire_and_work(shape, codec, ranks, algorithm, calibration, chunks, islands)
    return wire + work - _hidden(wire, work, chunks, calibration)


def choose_chunks(
    shape: Sequence[int],
    codec: Codec | CodecPair,
    ranks: int,
    algorithm: str,
    calibration: Calibration,
    chunk_bytes: int | None,
    islands: Islands | None = None,
) -> int:
    """Into how many chunks, of a message of at least `chunk_bytes` each, a sum by `algorithm` goes; None: into one."""
    by_level = algorithm == "hierarchical"
    most = most_chunks(shape, codec, ranks, chunk_bytes, islands if by_level else None) if chunk_bytes else 1
    if not calibration.codecs or by_level and not calibration.inside:
        return most

    def seconds(chunks: int) -> float:
        wire, work = wire_and_work(shape, codec, ranks, algorithm, calibration, chunks, islands)
        return wire + work - _hidden(wire, work, chunks, calibration)

    return min(range(1, most + 1), key=seconds)


def choose_parts(
    shape: Sequence[int],
    codec: Codec | CodecPair,
    ranks: int,
    algorithm: str,
    calibration: Calibration,
    device: torch.device,
    islands: Islands | None = None,
) -> int:
    """Into how many parts of its rows a sum goes whose layer computes meanwhile; 1 where that is not done.

    What computing hides of the wire comes on top of what is predicted here, of codec and wire alone.
    """
    return choose_chunks(shape, codec, ranks, algorithm, calibration, exchange.overlap_bytes(device.type), islands)


def most_chunks(
    shape: Sequence[int], codec: Codec | CodecPair, ranks: int, chunk_bytes: int, islands: Islands | None = None
) -> int:
    """Into how many chunks, of a message of at least `chunk_bytes` each, an all-reduce can go.

    islands: of a hierarchical one, where a rank's message is that of its share.
    """
    shares, slices = (islands.shares, islands.shares * len(islands.members)) if islands else (1, ranks)
    nbytes = max(each.message_bytes(shape) for each in step_codecs(codec)) // shares
    return exchange.most_chunks(math.prod(shape[:-1]), slices, nbytes, chunk_bytes)


def _hidden(wire: float, work: float, chunks: int, calibration: Calibration) -> float:
    return calibration.hidden * min(wire, work) * (1 - 1 / chunks)


def wire_and_work(
    shape: Sequence[int],
    codec: Codec | CodecPair,
    ranks: int,
    algorithm: str,
    calibration: Calibration,
    chunks: int,
    islands: Islands | None = None,
) -> tuple[float, float]:
    """Seconds on the wire, and those of the codec, of a sum by a named algorithm in so many chunks."""
    if algorithm == "hierarchical":
        assert islands is not None
        return _by_level(shape, codec, calibration, chunks, islands)
    values = math.prod(shape)
    first, second = (calibration.cost(each) for each in step_codecs(codec))
    wire = _flat_wire(shape, codec, ranks, algorithm, calibration.links)
    if algorithm == "gather_sum":
        return wire, _encode(first, values, chunks) + _decode(first, ranks * values, chunks)
    work = _encode(first, values, chunks) + _decode(first, values, chunks)
    return wire, work + _encode(second, values / ranks, chunks) + _decode(second, values, chunks)


def _flat_wire(
    shape: Sequence[int], codec: Codec | CodecPair, ranks: int, algorithm: str, links: Mapping[str, Link]
) -> float:
    if algorithm == "gather_sum":
        return links["all_gather"].seconds(received_bytes(shape, codec, ranks, algorithm, 0))
    scattered, gathered = two_step_bytes(shape, codec, ranks)
    return links["all_to_all"].seconds(scattered) + links["all_gather"].seconds(gathered)


def _by_level(
    shape: Sequence[int], codec: Codec | CodecPair, calibration: Calibration, chunks: int, islands: Islands
) -> tuple[float, float]:
    """`wire_and_work` of `hierarchical`, on the first rank of the largest island: no share is longer than its own."""
    values, machines, shares = math.prod(shape), len(islands.members), islands.shares
    first, second = (calibration.cost(each) for each in step_codecs(codec))
    across = flat_across(codec, islands)
    largest = max(islands.members, key=len)
    share = (slice_rows(shape, shares)[0], shape[-1])
    gathered = (len(largest) - 1) * share_slots(shape, codec, islands)
    raw = (len(largest) - 1) * math.prod(share) * calibration.itemsize
    wire = _flat_wire(share, codec, machines, across, calibration.across)
    wire += calibration.inside["all_to_all"].seconds(raw) + calibration.inside["all_gather"].seconds(gathered)
    work = _encode(first, values / shares, chunks)
    if across == "gather_sum":
        return wire, work + _decode(first, machines * values, chunks)
    work += _decode(first, values / shares, chunks) + _encode(second, values / shares / machines, chunks)
    return wire, work + _decode(second, values, chunks)


def scatter_seconds(
    shape: Sequence[int],
    codec: Codec,
    ranks: int,
    calibration: Calibration = ASSUMED,
    islands: Islands | None = None,
) -> float:
    """Of a compressed reduce-scatter into equal shares: the flat one, or with `islands` the hierarchical one."""
    values: float = math.prod(shape)
    cost = calibration.cost(codec)
    nbytes = codec.message_bytes(shape)
    if islands is None:
        wire = calibration.links["all_to_all"].seconds((ranks - 1) / ranks * nbytes)
    else:
        machines, mates = len(islands.members), islands.shares
        raw = (mates - 1) / mates * values * calibration.itemsize
        wire = calibration.inside["all_to_all"].seconds(raw)
        wire += calibration.across["all_to_all"].seconds((machines - 1) / ranks * nbytes)
        values /= mates
    of_bytes = calibration.chunk_bytes
    chunks = exchange.most_chunks(math.prod(shape[:-1]) // ranks, 1, nbytes, of_bytes) if of_bytes else 1
    work = _encode(cost, values, chunks) + _decode(cost, values, chunks)
    return wire + work - _hidden(wire, work, chunks, calibration)


def _encode(cost: CodecCost, values: float, calls: int = 1) -> float:
    return calls * cost.encode_fixed_s + values * cost.encode_s_per_value


def _decode(cost: CodecCost, values: float, calls: int = 1) -> float:
    return calls * cost.decode_fixed_s + values * cost.decode_s_per_value
