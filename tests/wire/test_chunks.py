# SPDX-License-Identifier: Apache-2.0
"""Sums in chunks: how messages are cut, that neither bits nor bytes depend on it, and handles of unfinished sums."""

import itertools
import os
import time
from datetime import timedelta

import oracles
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from sums import Wire, digest, expected_gather_sum, expected_two_step, tensor

from megatron_comp.wire import exchange
from megatron_comp.wire.codec import parse_codec
from megatron_comp.wire.collectives import PendingAllReduce, all_reduce, reduce_scatter
from megatron_comp.wire.plan import plan_all_reduce
from megatron_comp.wire.traffic import received_bytes, received_bytes_scatter, slice_rows

CODECS = ["mxfp4", "nvfp4", "int5:32:fp16:hadamard", "fp5_e2m2:8:e5m0", "int4:128:fp16:asym:spike", "mxfp4>mxfp8"]
# Three of them leave rows over after whole multiples of 16 rows a rank; one is too short for two chunks.
SHAPES = [(200, 33), (2, 97, 40), (256, 64), (15, 96)]
# Of a chunk: everything in one, a few, and as many as there may be.
SIZES = [1 << 30, 2000, 1]


@given(
    rows=st.integers(0, 5000),
    slices=st.integers(1, 8),
    nbytes=st.integers(0, 1 << 24),
    of_bytes=st.integers(1, 1 << 22),
)
def test_chunks_make_up_the_rows(rows, slices, nbytes, of_bytes):
    most = exchange.most_chunks(rows, slices, nbytes, of_bytes)
    chunks = exchange.chunk_rows(rows, slices, most)
    assert sum(chunks) == rows
    assert len(chunks) == most <= max(1, min(nbytes // of_bytes, exchange.MAX_CHUNKS))
    if len(chunks) > 1:
        assert all(count and count % (16 * slices) == 0 for count in chunks[:-1])
        # Alike, but for the rows that are left over.
        assert max(chunks[:-1]) - min(chunks[:-1]) <= 16 * slices
        assert 0 <= chunks[0] // (16 * slices) - chunks[-1] // (16 * slices) <= 1


def test_a_number_of_chunks_that_is_asked_for():
    assert exchange.chunk_rows(1000, 1, 3) == [336, 336, 328]
    assert exchange.chunk_rows(1000, 1, 1) == [1000]
    assert len(exchange.chunk_rows(1 << 20, 4, 40)) == 40
    assert exchange.chunk_rows(100, 2, 40) == [32, 32, 36]


def test_how_many_chunks():
    """At least so many bytes each, and never more than the largest number."""
    assert exchange.most_chunks(1000, 1, 1023, 512) == 1
    assert exchange.most_chunks(1000, 1, 1024, 512) == 2
    assert exchange.chunk_rows(1000, 1, 2) == [496, 504]
    assert exchange.most_chunks(1 << 20, 4, 1 << 30, 1) == exchange.MAX_CHUNKS
    assert exchange.most_chunks(127, 4, 1 << 30, 1) == 1
    assert exchange.most_chunks(128, 4, 1 << 30, 1) == 2
    assert exchange.chunk_rows(128, 4, 2) == [64, 64]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("name", oracles.PRESETS)
def test_chunks_are_the_message_in_bytes_and_slices(name, ranks):
    """Also where sections are padded: all of the padding is in the last chunk."""
    codec = parse_codec(name)
    for rows, hidden in itertools.product((16 * ranks, 200, 1013), (1, 33, 576)):
        chunks = exchange.chunk_rows(rows, ranks, exchange.MAX_CHUNKS)
        assert sum(codec.message_bytes((count, hidden)) for count in chunks) == codec.message_bytes((rows, hidden))
        for rank in range(ranks):
            mine = [slice_rows((count, hidden), ranks)[rank] for count in chunks]
            assert sum(mine) == slice_rows((rows, hidden), ranks)[rank]
            whole = codec.message_bytes((sum(mine), hidden))
            assert sum(codec.message_bytes((count, hidden)) for count in mine) == whole


def cases():
    """(number, operation, codec, algorithm, shape, dtype); the ways to sum go around, with codecs and with shapes."""
    ways = [("all_reduce", "gather_sum"), ("all_reduce", "two_step"), ("reduce_scatter", None)]
    made = []
    for (number, codec), (place, shape) in itertools.product(enumerate(CODECS), enumerate(SHAPES)):
        operation, algorithm = ways[1 if ">" in codec else (number + place) % 3]
        dtype = [torch.float32, torch.bfloat16][(number + place // 2) % 2]
        made.append((len(made), operation, codec, algorithm, shape, dtype))
    return made


def uneven_splits(rows, ranks):
    """The last rank has twice as many rows as any other, the first none where there are three and more."""
    first = [0] if ranks > 2 else []
    middle = [rows // (ranks + 1)] * (ranks - 1 - len(first))
    return [*first, *middle, rows - sum(middle)]


def summed(case, rank, ranks, async_op=False):
    number, operation, codec, algorithm, shape, dtype = case
    x = tensor(number, rank, shape, dtype)
    if operation == "all_reduce":
        y = all_reduce(x, codec, None, algorithm, async_op)
    else:
        y = reduce_scatter(x, codec, None, uneven_splits(shape[0], ranks), async_op)
    if async_op:
        x.fill_(torch.nan)  # it is on its way already
    return y


def in_sizes(rank, ranks):
    """For each case and size of chunks: digest of the sum, and what was sent for it."""
    results = []
    for case in cases():
        for size in SIZES:
            exchange.CHUNK_BYTES["cpu"] = size
            with Wire(rank) as wire:
                y = summed(case, rank, ranks)
            results.append((digest(y), wire.calls))
    return results


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_neither_bits_nor_bytes_depend_on_chunks(ranks):
    results = run_ranks(in_sizes, ranks)
    most = 0
    for number, case in enumerate(cases()):
        _, operation, name, algorithm, shape, dtype = case
        codec, tensors = parse_codec(name), [tensor(case[0], rank, shape, dtype) for rank in range(ranks)]
        for rank in range(ranks):
            # There is no chunk in what is expected.
            if operation == "all_reduce":
                function = expected_gather_sum if algorithm == "gather_sum" else expected_two_step
                expected, nbytes = function(tensors, codec), received_bytes(shape, codec, ranks, algorithm, rank)
            else:
                splits = uneven_splits(shape[0], ranks)
                expected = expected_gather_sum(tensors, codec).split(splits)[rank]
                nbytes = received_bytes_scatter(shape, codec, ranks, rank, splits)
            phases = {"gather_sum": 1, "two_step": 2, None: 1}[algorithm]
            counts = []
            for place in range(len(SIZES)):
                found, calls = results[rank][number * len(SIZES) + place]
                assert found == digest(expected), (case, SIZES[place])
                assert sum(received for _, received in calls) == nbytes, (case, SIZES[place])
                counts.append(len(calls) // phases)
            assert counts == sorted(counts) and counts[0] == 1, case
            most = max(most, counts[-1])
    assert most > 5


def handles(rank, ranks):
    """Several sums under way at once, waited for twice and in another order than they were started in."""
    exchange.CHUNK_BYTES["cpu"] = 2000
    at_once = [digest(summed(case, rank, ranks)) for case in cases()]
    pending = [summed(case, rank, ranks, async_op=True) for case in cases()]
    waited = [digest(handle.wait()) for handle in reversed(pending)]
    again = [handle.wait() for handle in pending]
    nothing = torch.empty(0, 33)
    empty = all_reduce(nothing, "mxfp4", async_op=True).wait() is nothing
    scattered = reduce_scatter(nothing, "mxfp4", async_op=True).wait().shape == (0, 33)
    dist.barrier()
    return at_once, waited[::-1], [digest(y) for y in again], empty and scattered


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_handle_gives_the_same_sum(ranks):
    for at_once, waited, again, empty in run_ranks(handles, ranks):
        # A single rank's own tensor comes back, which `summed` has overwritten.
        assert ranks == 1 or at_once == waited
        assert waited == again and empty


def started(rank, ranks):
    """What is on the wire before anybody waits, and after."""
    exchange.CHUNK_BYTES["cpu"] = 1
    x = tensor(0, rank, (64, 96), torch.float32)
    counts = {}
    for algorithm in ("gather_sum", "two_step"):
        with Wire(rank) as wire:
            handle = all_reduce(x, "mxfp4", None, algorithm, async_op=True)
            before = [name for name, _ in wire.calls]
            handle.wait()
        counts[algorithm] = before, [name for name, _ in wire.calls[len(before) :]]
    return counts


def test_the_exchange_starts_at_the_call():
    for counts in run_ranks(started, 2):
        assert counts == {
            "gather_sum": (["_allgather_base_"] * 2, []),
            "two_step": (["alltoall_base_"] * 2, ["_allgather_base_"] * 2),
        }


def taken(rank, ranks):
    """By (algorithm, advanced or not): the sum in one piece, the parts that were taken, and the rest waited for."""
    x, made = tensor(0, rank, (5, 60, 96), torch.float32), {}
    rows = exchange.chunk_rows(300, ranks, 4)
    for case in itertools.product(("gather_sum", "two_step"), (False, True)):
        out = torch.empty_like(x)
        plan = plan_all_reduce(x.shape, parse_codec("mxfp4"), ranks, rank, case[0], 4)
        assert plan.row_counts == rows
        pending = PendingAllReduce(out, plan, None)
        for part in x.view(300, 96).split(rows):
            pending.push(part.clone())
            if case[1]:
                pending.advance()
        first = pending.take()
        at_once = torch.equal(first, out.view(300, 96)[: rows[0]])
        rest = [pending.take() for _ in rows[2:]]
        pending.wait()  # the last one
        whole = all_reduce(x, "mxfp4", None, case[0], chunks=1)
        made[case] = at_once, torch.equal(out, whole), [len(part) for part in rest], pending.take()
    return rows, made


@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_are_taken_as_they_arrive(ranks):
    for rows, made in run_ranks(taken, ranks):
        assert len(rows) == 4 and len(made) == 4
        assert all(case == (True, True, rows[1:3], None) for case in made.values()), made


SECONDS = 3  # that ranks wait for each other


def hanging(rank, ranks, algorithm):
    """Rank 1 stays away from the second of two sums that are under way. (error, seconds it took)"""
    group = dist.new_group(timeout=timedelta(seconds=SECONDS))
    exchange.CHUNK_BYTES["cpu"] = 1
    x = torch.ones(96, 33)
    assert (all_reduce(x, "mxfp4", group, algorithm) == ranks).all()
    start = time.monotonic()
    if rank == 1:
        time.sleep(SECONDS + 2)
        os._exit(0)
    try:
        all_reduce(x, "mxfp4", group, algorithm, async_op=True).wait()
    except RuntimeError as error:
        return type(error).__name__, time.monotonic() - start
    return None


@pytest.mark.parametrize("algorithm", ["gather_sum", "two_step"])
def test_a_rank_that_stays_away_is_an_error_in_time(algorithm):
    results = run_ranks(hanging, 3, algorithm, timeout=40, may_die=(1,))
    for error, seconds in (results[0], results[2]):
        assert error.endswith("Error")
        assert seconds < SECONDS + 4
