# SPDX-License-Identifier: Apache-2.0
"""Rows that are dealt out, and bytes that each way to sum moves: as the contract's formulas say."""

import math

import oracles
import pytest

from megatron_comp.wire.codec import parse_codec
from megatron_comp.wire.traffic import (
    received_bytes,
    received_bytes_scatter,
    ring_bytes,
    scatter_rows,
    slice_rows,
)

RANKS = [2, 3, 4, 5, 6, 8]
SHAPES = [(1, 576), (7, 33), (5, 1), (2, 3, 576), (512, 8192), (33,), (4, 1024, 4096)]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", oracles.PRESETS)
def test_received_bytes(name, shape, ranks):
    """To the byte, from an independent count of messages."""
    codec, (text, _) = parse_codec(name), oracles.PRESETS[name]
    rows, hidden = math.prod(shape[:-1]), shape[-1]
    for rank in range(ranks):
        gathered = (ranks - 1) * oracles.message_bytes(text, shape)
        assert received_bytes(shape, codec, ranks, "gather_sum", rank) == gathered
        own = rows // ranks + (rank < rows % ranks)
        slot = -(-rows // ranks)
        stepped = sum(oracles.message_bytes(text, (count, hidden)) for count in (own, slot)) * (ranks - 1)
        assert received_bytes(shape, codec, ranks, "two_step", rank) == stepped


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", oracles.PRESETS)
def test_formulas_of_the_contract(name, ranks):
    """(N-1) * message, and 2 (N-1)/N * message where rows divide by N and sections need no padding."""
    codec, shape = parse_codec(name), (1920, 256)
    message = codec.message_bytes(shape)
    for rank in range(ranks):
        assert received_bytes(shape, codec, ranks, "gather_sum", rank) == (ranks - 1) * message
        assert received_bytes(shape, codec, ranks, "two_step", rank) == 2 * (ranks - 1) * message / ranks
        assert received_bytes_scatter(shape, codec, ranks, rank) == (ranks - 1) * message / ranks


def test_pairs_count_each_phase_with_its_own_codec():
    pair, shape = parse_codec("int4:32:fp16>int8:32:fp16"), (1920, 256)
    first, second = (part.message_bytes(shape) for part in (pair.first, pair.second))
    assert received_bytes(shape, pair, 4, "two_step", 0) == 3 * (first + second) / 4


@pytest.mark.parametrize("shape", [(0, 576), (2, 0, 33)], ids=str)
def test_nothing_moves_for_nothing(shape):
    assert received_bytes(shape, parse_codec("mxfp4"), 4, "gather_sum", 0) == 0
    assert received_bytes(shape, parse_codec("mxfp4"), 4, "two_step", 0) == 0
    assert received_bytes_scatter(shape, parse_codec("mxfp4"), 2, 1) == 0
    assert received_bytes_scatter((4, 33), parse_codec("mxfp4"), 1, 0) == 0
    assert received_bytes((5, 33), parse_codec("mxfp4"), 1, "gather_sum", 0) == 0


@pytest.mark.parametrize("ranks", [1, *RANKS])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 12, 1000])
def test_slices(rows, ranks):
    """As even as can be, longer ones first."""
    slices = slice_rows((rows, 5), ranks)
    assert len(slices) == ranks and sum(slices) == rows
    assert slices == sorted(slices, reverse=True) and slices[0] - slices[-1] <= 1


@pytest.mark.parametrize(
    "shape, ranks, splits, rows",
    [
        ((6, 8), 3, None, [2, 2, 2]),
        ((6, 5, 8), 2, None, [3, 3]),
        ((0, 8), 4, None, [0, 0, 0, 0]),
        ((6, 8), 3, [1, 5, 0], [1, 5, 0]),
        ((7, 2, 8), 2, (0, 7), [0, 7]),
        ((0, 8), 2, [0, 0], [0, 0]),
        ((5, 8), 1, [5], [5]),
    ],
)
def test_shares_of_a_reduce_scatter(shape, ranks, splits, rows):
    assert scatter_rows(shape, ranks, splits) == rows


@pytest.mark.parametrize(
    "shape, ranks, splits, message",
    [
        ((7, 8), 2, None, r"rows divisible by 2, or splits, not \(7, 8\)"),
        ((8,), 2, None, r"needs \[rows, ..., hidden\], not \(8,\)"),
        ((8,), 2, [4, 4], r"needs \[rows, ..., hidden\], not \(8,\)"),
        ((7, 8), 2, [3, 3, 1], r"over 2 ranks: splits \[3, 3, 1\] do not make up 7 rows"),
        ((7, 8), 2, [7], r"over 2 ranks: splits \[7\] do not"),
        ((7, 8), 2, [3, 3], r"splits \[3, 3\] do not make up 7 rows"),
        ((7, 8), 2, [8, -1], r"splits \[8, -1\] do not make up 7 rows"),
        ((7, 8), 2, [], r"splits \[\] do not make up 7 rows"),
    ],
)
def test_shares_that_do_not_fit(shape, ranks, splits, message):
    with pytest.raises(ValueError, match=message):
        scatter_rows(shape, ranks, splits)


@pytest.mark.parametrize("splits", [[1, 5, 0], [2, 2, 2], None], ids=str)
@pytest.mark.parametrize("name", oracles.PRESETS)
def test_received_bytes_of_a_reduce_scatter(name, splits):
    """Every other rank sends a message of this rank's rows."""
    codec, (text, _), shape = parse_codec(name), oracles.PRESETS[name], (6, 3, 33)
    for rank in range(3):
        rows = (splits or [2, 2, 2])[rank]
        expected = 2 * oracles.message_bytes(text, (rows, 3, 33)) if rows else 0
        assert received_bytes_scatter(shape, codec, 3, rank, splits) == expected


@pytest.mark.parametrize("ranks, passes, expected", [(2, 2, 1000), (4, 2, 1500), (5, 1, 800), (1, 2, 0)])
def test_ring(ranks, passes, expected):
    assert ring_bytes(1000, ranks, passes) == expected
