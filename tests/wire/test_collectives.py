"""Compressed sums on real gloo ranks: the same bits everywhere, those of one process, and the promised bytes.

Each process start runs many cases; the expected results come from `sums.py`, plain fp32 additions.
"""

import itertools
import math
import os
import signal
import time
from datetime import timedelta

import oracles
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from sums import Wire, digest, expected_gather_sum, expected_reduce_scatter, expected_two_step, tensor

from megatron_comp.wire.codec import parse_codec
from megatron_comp.wire.collectives import all_reduce, reduce_scatter
from megatron_comp.wire.cost import received_bytes, received_bytes_scatter

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = ["int4:32:fp16>int8:32:fp16", "mxfp4>mxfp8", "int4:128:fp16:asym:spike>fp5_e2m2:8:e5m0:hadamard:search"]
SHAPES = [(1, 576), (7, 1), (7, 33), (7, 576), (11, 4096), (2, 3, 576), (33,), (0, 576), (2, 0, 33)]
ALIGNED = (960, 64)  # rows divide by all N here, and no section needs padding, whole or in slices


def cases(ranks):
    """(operation, codec, algorithm, shape, dtype), in the order in which every rank runs them.

    The type goes around with N, so that over three N every codec, algorithm and shape is seen with all three.
    """
    shapes = SHAPES if ranks < 6 else [(7, 33), (1, 576)]
    for number, (codec, algorithm, shape) in enumerate(
        itertools.product(oracles.PRESETS, ["gather_sum", "two_step"], shapes)
    ):
        yield "all_reduce", codec, algorithm, shape, [FP32, BF16, FP16][(number + ranks) % 3]
    for codec, algorithm in itertools.product(oracles.PRESETS, ["gather_sum", "two_step", "auto"]):
        yield "all_reduce", codec, algorithm, ALIGNED, BF16
    for pair, shape, dtype in itertools.product(PAIRS, [(7, 33), (1, 576), ALIGNED], [FP32, BF16]):
        yield "all_reduce", pair, "two_step", shape, dtype
    for codec, shape, dtype in itertools.product(oracles.PRESETS, [(1, 33), (3, 2, 96), (0, 8)], [FP32, BF16, FP16]):
        yield "reduce_scatter", codec, None, (shape[0] * ranks, *shape[1:]), dtype


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


GROUPS = [([0, 2], [1, 3]), ([1, 2, 3],), ([3, 0],)]


def sub_groups(rank, ranks):
    """Every group sums its own, some more often than others; then the world does."""
    groups = [[(members, dist.new_group(members)) for members in together] for together in GROUPS]
    results = {}
    for together in groups:
        for place, (members, group) in enumerate(together):
            if rank in members:
                for number, algorithm in enumerate(["gather_sum", "two_step"] * (place + 1)):
                    x = tensor(number, rank, (5, 65), BF16)
                    codec = ["nvfp4", "flash-int4"][place]
                    results[tuple(members), number] = digest(all_reduce(x, codec, group, algorithm))
                scattered = reduce_scatter(tensor(9, rank, (len(members) * 2, 40), FP32), "mxfp8", group)
                results[tuple(members), "scatter"] = digest(scattered)
    results["world"] = digest(all_reduce(tensor(7, rank, (5, 65), BF16), "mxfp4", algorithm="two_step"))
    return results


def test_sub_groups():
    """Ranks count within their group, in its order of ranks."""
    results = run_ranks(sub_groups, 4)
    world = expected_two_step([tensor(7, rank, (5, 65), BF16) for rank in range(4)], parse_codec("mxfp4"))
    assert {result["world"] for result in results} == {digest(world)}
    for together in GROUPS:
        for place, members in enumerate(together):
            codec = parse_codec(["nvfp4", "flash-int4"][place])
            ordered = sorted(members)
            for number, function in enumerate([expected_gather_sum, expected_two_step] * (place + 1)):
                sums = digest(function([tensor(number, rank, (5, 65), BF16) for rank in ordered], codec))
                assert {results[rank][tuple(members), number] for rank in members} == {sums}
            parts = [tensor(9, rank, (len(members) * 2, 40), FP32) for rank in ordered]
            for index, rank in enumerate(ordered):
                expected = expected_reduce_scatter(parts, parse_codec("mxfp8"), index)
                assert results[rank][tuple(members), "scatter"] == digest(expected)
    assert all(((0, 2), 0) not in results[rank] for rank in (1, 3))


def one_rank(rank, ranks):
    x = torch.randn(5, 33, requires_grad=True)
    wire = Wire(rank)
    with wire:
        for algorithm in ("auto", "gather_sum", "two_step"):
            assert all_reduce(x, "mxfp4", None, algorithm) is x
        assert all_reduce(x, PAIRS[0]) is x
        assert reduce_scatter(x, "mxfp4") is x
    assert wire.calls == []


def test_one_rank_gets_its_own_tensor_back():
    run_ranks(one_rank, 1)


def refused(rank, ranks):
    """Each wrong call fails before anything is sent, so that the right one after them works."""
    x, wire = torch.ones(4, 33), Wire(rank)
    calls = {
        "unknown algorithm 'ring'; known are auto": lambda: all_reduce(x, "mxfp4", None, "ring"),
        "gather_sum has one phase and takes one codec": lambda: all_reduce(x, "mxfp4>mxfp8", None, "gather_sum"),
        "neither a preset": lambda: all_reduce(x, "mxfp5"),
        "unknown scale 'fp17'": lambda: all_reduce(x, "mxfp4>int4:32:fp17"),
        "reduce_scatter has one phase and takes one codec": lambda: reduce_scatter(x, "mxfp4>mxfp8"),
        r"rows divisible by 2, or splits, not \(3, 33\)": lambda: reduce_scatter(x[:3], "mxfp4"),
        r"rows divisible by 2, or splits, not \(3, 4, 8\)": lambda: reduce_scatter(torch.ones(3, 4, 8), "mxfp4"),
        r"needs \[rows, ..., hidden\], not \(4,\)": lambda: reduce_scatter(x[:, 0], "mxfp4"),
        r"over 2 ranks: splits \[1, 2, 1\] do not make up 4 rows": lambda: reduce_scatter(x, "mxfp4", None, [1, 2, 1]),
        r"splits \[4\] do not make up 4 rows": lambda: reduce_scatter(x, "mxfp4", None, [4]),
        r"splits \[1, 2\] do not make up 4 rows": lambda: reduce_scatter(x, "mxfp4", None, [1, 2]),
        r"splits \[-1, 5\] do not make up 4 rows": lambda: reduce_scatter(x, "mxfp4", None, [-1, 5]),
        "takes one codec, not fp4_e2m1:32:e8m0>fp8": lambda: reduce_scatter(x, "mxfp4>mxfp8", None, [1, 3]),
        "not a scalar": lambda: all_reduce(torch.ones(()), "mxfp4"),
        "encodes torch.float32, .*, not torch.float64": lambda: all_reduce(x.double(), "mxfp4"),
        "encodes torch.float32, .*, not torch.int64": lambda: all_reduce(x.long(), "mxfp4", None, "two_step"),
        "encodes torch.float32, .*, not torch.float8_e4m3fn": lambda: reduce_scatter(
            x.to(torch.float8_e4m3fn), "mxfp4"
        ),
    }
    with wire:
        for message, call in calls.items():
            with pytest.raises((ValueError, TypeError), match=message):
                call()
    assert wire.calls == []
    return all_reduce(x, "mxfp4")


def test_wrong_arguments_are_refused_before_anything_is_sent():
    for y in run_ranks(refused, 2):
        assert torch.equal(y, torch.full((4, 33), 2.0))


def odd_inputs(rank, ranks):
    """Strided, with gradients asked for, in inference mode, parsed codecs: the same bits as plain input."""
    x = tensor(0, rank, (7, 66), BF16)[:, ::2]
    results = []
    for algorithm in ("gather_sum", "two_step"):
        plain = all_reduce(x.contiguous(), "mxfp4", None, algorithm)
        results.append(digest(plain))
        assert torch.equal(all_reduce(x, "mxfp4", None, algorithm), plain)
        assert torch.equal(all_reduce(x.t().contiguous().t(), parse_codec("mxfp4"), None, algorithm), plain)
        with_grad = all_reduce(x.clone().requires_grad_(), "mxfp4", None, algorithm)
        assert torch.equal(with_grad, plain) and not with_grad.requires_grad
        with torch.inference_mode():
            assert torch.equal(all_reduce(x.clone(), "mxfp4", None, algorithm), plain)
    rows = tensor(1, rank, (6, 66), BF16)[::2].expand(2, 3, 66).transpose(0, 1)[:2]
    assert torch.equal(reduce_scatter(rows, "nvfp4"), reduce_scatter(rows.contiguous(), "nvfp4"))
    return results


def test_odd_inputs():
    results = run_ranks(odd_inputs, 2)
    assert results[0] == results[1]


def shared(rank, ranks):
    """Sums whose own share, kept exact, would show: the ranks hold very different values."""
    x = torch.full((4, 64), 1 / 3) * 10.0**rank
    return [digest(all_reduce(x, "paper-llama3-8b", None, algorithm)) for algorithm in ("gather_sum", "two_step")]


def test_the_own_share_goes_through_the_codec():
    """A rank that kept its own share exact would hold other bits than its neighbours (a bug of two public systems)."""
    results = run_ranks(shared, 3)
    assert results[0] == results[1] == results[2]


def dying(rank, ranks, how, algorithm):
    """Rank 1 goes in the middle of a run of sums; the others must notice. (error, seconds it took) or None."""
    seconds = 6
    dist.init_process_group("gloo", init_method="env://", timeout=timedelta(seconds=seconds))
    start = time.monotonic()
    try:
        for number in range(10_000):
            if number == 20:
                start = time.monotonic()
                if rank == 1 and how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if rank == 1 and how == "hung":
                    time.sleep(seconds + 3)
                    os._exit(0)
            y = all_reduce(torch.ones(5, 33), "mxfp4", None, algorithm)
            assert (y == ranks).all()
    except RuntimeError as error:
        return type(error).__name__, time.monotonic() - start
    return None


@pytest.mark.parametrize("algorithm", ["gather_sum", "two_step"])
@pytest.mark.parametrize("how", ["killed", "hung"])
def test_a_rank_that_goes_is_an_error_on_the_others(how, algorithm):
    """Within the process group's timeout of 6 seconds, and never a wrong sum."""
    results = run_ranks(dying, 3, how, algorithm, timeout=40, init=False, may_die=(1,))
    assert results[1] is None
    for error, seconds in (results[0], results[2]):
        assert error.endswith("Error")
        assert seconds < 6 + 4
