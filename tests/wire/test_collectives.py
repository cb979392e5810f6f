# SPDX-License-Identifier: Apache-2.0
"""Compressed sums on real gloo ranks: the same bits everywhere, those of one process, and the promised bytes.

Each process start runs many cases; the expected results come from `sums.py`, plain fp32 additions.
"""

import itertools
import math

import oracles
import pytest
import torch
from ranks import run_ranks
from sums import Wire, digest, expected_gather_sum, expected_reduce_scatter, expected_two_step, tensor

from megatron_comp.wire.codec import parse_codec
from megatron_comp.wire.collectives import all_reduce, reduce_scatter
from megatron_comp.wire.traffic import received_bytes, received_bytes_scatter

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = ["int4:32:fp16>int8:32:fp16", "mxfp4>mxfp8", "int4:128:fp16:asym:spike>fp5_e2m2:8:e5m0:hadamard:search"]
SHAPES = [(1, 576), (7, 1), (7, 33), (7, 576), (11, 4096), (2, 3, 576), (33,), (0, 576), (2, 0, 33)]
ALIGNED = (960, 64)  # rows divide by all N here, and no section needs padding, whole or in slices


def cases(ranks):
    """(operation, codec, algorithm, shape, dtype), in the order in which every rank runs them.

    The type goes around with codec, shape and N. With one codec the algorithms take turns from shape to shape, and
    with the next N they are swapped.
    """
    shapes, types = SHAPES if ranks < 5 else [(7, 33), (1, 576)], [FP32, BF16, FP16]
    for (number, codec), (place, shape) in itertools.product(enumerate(oracles.PRESETS), enumerate(shapes)):
        algorithm = ["gather_sum", "two_step"][(number + place + ranks) % 2]
        yield "all_reduce", codec, algorithm, shape, types[(number + place + ranks) % 3]
    for codec, algorithm in itertools.product(oracles.PRESETS, ["gather_sum", "two_step", "auto"]):
        yield "all_reduce", codec, algorithm, ALIGNED, BF16
    for number, (pair, shape) in enumerate(itertools.product(PAIRS, [(7, 33), (1, 576), ALIGNED])):
        yield "all_reduce", pair, "two_step", shape, types[(number + ranks) % 2]
    for (number, codec), (place, shape) in itertools.product(
        enumerate(oracles.PRESETS), enumerate([(1, 33), (3, 2, 96), (0, 8)])
    ):
        yield "reduce_scatter", codec, None, (shape[0] * ranks, *shape[1:]), types[(number + place + ranks) % 3]


def case_id(case):
    return " ".join(map(str, case))


def expected_digests(number, case, ranks):
    """One for each rank."""
    operation, codec, algorithm, shape, dtype = case
    tensors, codec = [tensor(number, rank, shape, dtype) for rank in range(ranks)], parse_codec(codec)
    if operation == "reduce_scatter":
        if 0 in shape:
            return [digest(tensors[0][:0])] * ranks
        return [digest(expected_reduce_scatter(tensors, codec, rank)) for rank in range(ranks)]
    if 0 in shape:
        return [digest(tensors[0])] * ranks
    function = {"gather_sum": expected_gather_sum, "two_step": expected_two_step}[algorithm]
    return [digest(function(tensors, codec))] * ranks


# What the ranks run.


def run_cases(rank, ranks):
    results = []
    for number, case in enumerate(cases(ranks)):
        operation, codec, algorithm, shape, dtype = case
        x = tensor(number, rank, shape, dtype)
        before, wire = digest(x), Wire(rank)
        with wire:
            y = all_reduce(x, codec, None, algorithm) if operation == "all_reduce" else reduce_scatter(x, codec)
        assert digest(x) == before, f"{case}: the input was changed"
        assert y.dtype == dtype and y.is_contiguous(), case
        assert y.shape == (shape if operation == "all_reduce" else (shape[0] // ranks, *shape[1:])), case
        assert 0 in shape or y.data_ptr() != x.data_ptr(), case
        results.append((digest(y), wire.calls))
    return results


@pytest.fixture(scope="module", params=[2, 3, 4, 5, 6])
def outcome(request):
    """(N, what each rank found for each case)."""
    return request.param, run_ranks(run_cases, request.param)


def test_all_ranks_hold_the_bits_of_one_process(outcome):
    ranks, results = outcome
    wrong, count = [], 0
    for number, case in enumerate(cases(ranks)):
        found = [results[rank][number][0] for rank in range(ranks)]
        if case[0] == "all_reduce" and len(set(found)) != 1:
            wrong.append(f"{case_id(case)}: ranks differ")
        if case[2] != "auto":
            count += 1
            if found != expected_digests(number, case, ranks):
                wrong.append(f"{case_id(case)}: not the sum of one process")
    assert not wrong, "\n".join(wrong)
    print(f"N={ranks}: {count} sums equal to the bit on {ranks} ranks and in one process")


def test_bytes_are_the_promised_ones(outcome):
    """One collective a phase, of bytes only; counted bytes equal `received_bytes` and the contract's formulas."""
    ranks, results = outcome
    gather, scatter = "_allgather_base_", "alltoall_base_"
    for number, case in enumerate(cases(ranks)):
        operation, name, algorithm, shape, _ = case
        codec = parse_codec(name)
        for rank in range(ranks):
            calls = results[rank][number][1]
            total = sum(received for _, received in calls)
            names = [collective for collective, _ in calls]
            if 0 in shape:
                assert names == [], case
                continue
            if operation == "reduce_scatter":
                assert names == [scatter], case
                assert total == received_bytes_scatter(shape, codec, ranks, rank), case
                part = oracles.message_bytes(str(codec), (shape[0] // ranks, *shape[1:]))
                assert total == (ranks - 1) * part, case
                continue
            if algorithm == "auto":
                algorithm = "gather_sum" if len(names) == 1 else "two_step"
            assert names == {"gather_sum": [gather], "two_step": [scatter, gather]}[algorithm], case
            assert total == received_bytes(shape, codec, ranks, algorithm, rank), case
            if algorithm == "gather_sum":
                assert total == (ranks - 1) * oracles.message_bytes(str(codec), shape), case
            elif shape == ALIGNED:
                messages = [oracles.message_bytes(part, shape) for part in str(codec).split(">")]
                assert total * ranks == 2 * (ranks - 1) * sum(messages) / len(messages), case
        if algorithm == "auto" and ranks == 2:
            assert names == [gather], case


# Rows of every rank, and what follows the rows in the shape.
UNEVEN = [
    ((1, 5, 0), (576,)),
    ((0, 0, 7), (33,)),
    ((4, 1, 2), (3, 96)),
    ((2, 2, 2), (40,)),
    ((0, 0, 0), (40,)),
    ((3, 1, 2), (0,)),
]


def uneven(rank, ranks):
    """For every case: digest and shape of the sum of this rank's rows, its input untouched, and what was received."""
    results = []
    for number, (codec, (splits, rest), dtype) in enumerate(itertools.product(oracles.PRESETS, UNEVEN, [FP32, BF16])):
        x = tensor(number, rank, (sum(splits), *rest), dtype)
        before, wire = digest(x), Wire(rank)
        with wire:
            y = reduce_scatter(x, codec, None, list(splits))
        assert y.dtype == dtype and y.is_contiguous() and digest(x) == before
        assert digest(reduce_scatter(x, parse_codec(codec), None, tuple(splits))) == digest(y)
        results.append((digest(y), y.shape, wire.calls))
    return results


def test_uneven_slices_hold_the_bits_of_one_process_and_send_the_promised_bytes():
    results = run_ranks(uneven, 3)
    for number, (name, (splits, rest), dtype) in enumerate(itertools.product(oracles.PRESETS, UNEVEN, [FP32, BF16])):
        case, codec, shape = (name, splits, rest), parse_codec(name), (sum(splits), *rest)
        tensors = [tensor(number, rank, shape, dtype) for rank in range(3)]
        for rank in range(3):
            found, its_shape, calls = results[rank][number]
            assert its_shape == (splits[rank], *rest), case
            received = sum(nbytes for _, nbytes in calls)
            assert [collective for collective, _ in calls] == ([] if 0 in shape else ["alltoall_base_"]), case
            assert received == received_bytes_scatter(shape, codec, 3, rank, splits), case
            if splits[rank] and 0 not in rest:
                first = sum(splits[:rank])
                parts = [each[first : first + splits[rank]] for each in tensors]
                assert found == digest(expected_gather_sum(parts, codec)), case
                assert received == 2 * oracles.message_bytes(str(codec), (splits[rank], *rest)), case
            else:
                assert received == 0, case


def nan_on_rank_one(rank, ranks):
    """For every preset and algorithm: 3 rows, a NaN or infinity in the middle one."""
    results = []
    for codec, algorithm, poison in itertools.product(
        oracles.PRESETS, ["gather_sum", "two_step"], [math.nan, math.inf, -math.inf]
    ):
        x = tensor(0, rank, (3, 300), BF16)
        if rank == 1:
            x[1, 130] = poison
        y = all_reduce(x, codec, None, algorithm)
        results.append((codec, y, digest(y)))
    return results


def test_nan_on_one_rank_is_nan_in_its_block_on_all():
    results = run_ranks(nan_on_rank_one, 3)
    for (codec, y, found), *others in zip(*results, strict=True):
        assert {found} == {other for _, _, other in others}
        block = parse_codec(codec).format.block
        expected = torch.zeros(3, 300, dtype=torch.bool)
        expected[1, 130 // block * block : (130 // block + 1) * block] = True
        assert torch.equal(y.isnan(), expected), codec
        assert not y.isinf().any(), codec
