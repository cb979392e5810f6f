# SPDX-License-Identifier: Apache-2.0
"""How the rows of a sum are dealt out, and what each way to sum moves, to the byte.

N ranks receive of a message `gather_sum` (N - 1), `two_step` 2 (N - 1) / N and a scatter (N - 1) / N times its bytes. A
hierarchical sum (`hierarchical.py`) has two levels: raw rows and messages inside islands, messages across.
"""

import math
from collections.abc import Sequence

from .codec import Codec, CodecPair
from .topology import Islands


def step_codecs(codec: Codec | CodecPair) -> tuple[Codec, Codec]:
    """The codecs of the two steps of a two-step sum."""
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


def ring_bytes(nbytes: int, ranks: int, passes: int = 2) -> int:
    """Bytes each rank receives in a ring over a tensor of `nbytes`: all-reduce takes 2 passes, reduce-scatter 1."""
    return passes * (ranks - 1) * nbytes // ranks


def two_step_bytes(shape: Sequence[int], codec: Codec | CodecPair, ranks: int) -> tuple[int, int]:
    """What the rank with the longest slice receives in each of the two steps."""
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


def received_bytes_scatter(
    shape: Sequence[int], codec: Codec, ranks: int, rank: int, splits: Sequence[int] | None = None
) -> int:
    """Bytes that `rank` receives from the others in one `reduce_scatter` of `shape`."""
    if ranks == 1 or 0 in shape:
        return 0
    return (ranks - 1) * codec.message_bytes((scatter_rows(shape, ranks, splits)[rank], *shape[1:]))


def flat_across(codec: Codec | CodecPair, islands: Islands) -> str:
    """The flat algorithm that goes between islands: `gather_sum` between two, where `two_step` would send as much and
    round twice; `two_step` between more, and for two codecs."""
    return "gather_sum" if len(islands.members) == 2 and not isinstance(codec, CodecPair) else "two_step"


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
    slots, hidden = share_slots(shape, codec, islands), shape[-1]
    if place >= islands.shares:
        return (mates - 1) * slots, 0
    own = slice_rows(shape, islands.shares)[place]
    across = (machines - 1) * (slots // machines)
    if flat_across(codec, islands) == "two_step":
        rows = slice_rows((own, hidden), machines)[island]
        across += (machines - 1) * step_codecs(codec)[0].message_bytes((rows, hidden))
    return (mates - 1) * (own * hidden * itemsize + slots), across


def share_slots(shape: Sequence[int], codec: Codec | CodecPair, islands: Islands) -> int:
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
