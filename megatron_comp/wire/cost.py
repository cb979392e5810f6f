# SPDX-License-Identifier: Apache-2.0
"""What each algorithm moves and how long it is predicted to take, from things that are the same on all ranks.

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


def flat_across(codec: Codec | CodecPair, islands: Islands) -> str:
    """The flat algorithm that goes between islands: `gather_sum` between two, where `two_step` would send as much and
    round twice; `two_step` between more, and for two codecs."""
    return "gather_sum" if len(islands.members) == 2 and not isinstance(codec, CodecPair) else "two_step"


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
    by_level, slices = algorithm == "hierarchical", ranks
    if by_level:
        assert islands is not None
        slices = islands.shares * len(islands.members)
    most = most_chunks(shape, codec, slices, chunk_bytes) if chunk_bytes else 1
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


def most_chunks(shape: Sequence[int], codec: Codec | CodecPair, slices: int, chunk_bytes: int) -> int:
    """Into how many chunks, of a message of at least `chunk_bytes` each, an all-reduce can go whose rows are dealt out
    in so many slices."""
    nbytes = max(each.message_bytes(shape) for each in step_codecs(codec))
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
    gathered = (len(largest) - 1) * _share_slots(shape, codec, islands)
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


def two_step_bytes(shape: Sequence[int], codec: Codec | CodecPair, ranks: int) -> tuple[int, int]:
    """What the rank with the longest slice receives in each of the two phases."""
    rows = (slice_rows(shape, ranks)[0], shape[-1])
    first, second = step_codecs(codec)
    return (ranks - 1) * first.message_bytes(rows), (ranks - 1) * second.message_bytes(rows)


def received_bytes(shape: Sequence[int], codec: Codec | CodecPair, ranks: int, algorithm: str, rank: int) -> int:
    """Bytes that `rank` receives from the others in one `all_reduce` of `shape`, to the byte."""
    if ranks == 1 or 0 in shape:
        return 0
    if algorithm == "gather_sum":
        return (ranks - 1) * codec.message_bytes(shape)
    first, second = step_codecs(codec)
    rows, hidden = slice_rows(shape, ranks), shape[-1]
    return (ranks - 1) * (first.message_bytes((rows[rank], hidden)) + second.message_bytes((rows[0], hidden)))


def received_by_level(
    shape: Sequence[int], codec: Codec | CodecPair, algorithm: str, islands: Islands, rank: int, itemsize: int
) -> tuple[int, int]:
    """(from ranks of its own island, from all others): bytes that `rank` receives in one `all_reduce`, to the byte.

    algorithm: `gather_sum`, `two_step` or `hierarchical`. itemsize: bytes per value of the tensor.
    """
    ranks, (island, place) = islands.ranks, islands.find(rank)
    mates, machines = len(islands.members[island]), len(islands.members)
    if ranks == 1 or 0 in shape:
        return 0, 0
    if algorithm != "hierarchical":
        of_one = received_bytes(shape, codec, ranks, algorithm, rank) // (ranks - 1)
        return (mates - 1) * of_one, (ranks - mates) * of_one
    slots, hidden = _share_slots(shape, codec, islands), shape[-1]
    if place >= islands.shares:
        return (mates - 1) * slots, 0
    own = slice_rows(shape, islands.shares)[place]
    across = (machines - 1) * (slots // machines)
    if flat_across(codec, islands) == "two_step":
        rows = slice_rows((own, hidden), machines)[island]
        across += (machines - 1) * step_codecs(codec)[0].message_bytes((rows, hidden))
    return (mates - 1) * (own * hidden * itemsize + slots), across


def _share_slots(shape: Sequence[int], codec: Codec | CodecPair, islands: Islands) -> int:
    """Bytes of what a rank of a hierarchical all-reduce hands on inside its island: a slot for each island's message,
    each with room for the longest."""
    machines = len(islands.members)
    share = (slice_rows(shape, islands.shares)[0], shape[-1])
    rows = share if flat_across(codec, islands) == "gather_sum" else (slice_rows(share, machines)[0], shape[-1])
    return machines * step_codecs(codec)[1].message_bytes(rows)


def received_by_level_scatter(
    shape: Sequence[int],
    codec: Codec,
    islands: Islands,
    rank: int,
    itemsize: int,
    splits: Sequence[int] | None = None,
) -> tuple[int, int]:
    """The same of a hierarchical `reduce_scatter`."""
    island, place = islands.find(rank)
    if 0 in shape:
        return 0, 0
    rows, of_row = scatter_rows(shape, islands.ranks, splits), math.prod(shape[1:])
    of_place = sum(rows[peer] for peer in islands.across(place))
    message = codec.message_bytes((rows[rank], *shape[1:]))
    return (islands.shares - 1) * of_place * of_row * itemsize, (len(islands.members) - 1) * message


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
