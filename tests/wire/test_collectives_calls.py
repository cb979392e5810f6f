# SPDX-License-Identifier: Apache-2.0
"""Calls of compressed sums: in groups, of odd inputs, wrong ones, and when a rank goes. Which: `test_collectives`."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from sums import Wire, digest, expected_gather_sum, expected_reduce_scatter, expected_two_step, tensor

from megatron_comp.wire.codec import parse_codec
from megatron_comp.wire.collectives import all_reduce, reduce_scatter

FP32, BF16 = torch.float32, torch.bfloat16
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


def uncompressed(rank, ranks):
    x = tensor(3, rank, (5, 33), FP32)
    before, odd = x.clone(), x.t()
    sums = [
        all_reduce(x, "none"),
        all_reduce(x, "none", async_op=True).wait(),
        all_reduce(odd, "none").t(),
        reduce_scatter(x, "none", splits=[1, 0, 4]),
        reduce_scatter(x[:3], "none", async_op=True).wait(),
    ]
    return sums, torch.equal(x, before)


def test_the_codec_none_is_the_stock_sum():
    total = sum(tensor(3, rank, (5, 33), FP32) for rank in range(3))
    for rank, (sums, kept) in enumerate(run_ranks(uncompressed, 3)):
        assert kept
        for found, expected in zip(sums, [total] * 3 + [total.split([1, 0, 4])[rank], total[rank : rank + 1]]):
            torch.testing.assert_close(found, expected)


def one_rank(rank, ranks):
    x = torch.randn(5, 33, requires_grad=True)
    wire = Wire(rank)
    with wire:
        for algorithm in ("auto", "gather_sum", "two_step"):
            assert all_reduce(x, "mxfp4", None, algorithm) is x
        assert all_reduce(x, "int4:32:fp16>int8:32:fp16") is x
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


SECONDS = 3  # that ranks wait for each other


def dying(rank, ranks, how, algorithm):
    """Rank 1 goes in the middle of a run of sums; the others must notice. (error, seconds it took) or None."""
    group = dist.new_group(timeout=timedelta(seconds=SECONDS))
    start = time.monotonic()
    try:
        for number in range(10_000):
            if number == 20:
                start = time.monotonic()
                if rank == 1 and how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if rank == 1 and how == "hung":
                    time.sleep(SECONDS + 2)
                    os._exit(0)
            y = all_reduce(torch.ones(5, 33), "mxfp4", group, algorithm)
            assert (y == ranks).all()
    except RuntimeError as error:
        return type(error).__name__, time.monotonic() - start
    return None


@pytest.mark.parametrize("algorithm", ["gather_sum", "two_step"])
@pytest.mark.parametrize("how", ["killed", "hung"])
def test_a_rank_that_goes_is_an_error_on_the_others(how, algorithm):
    """Within the process group's timeout, and never a wrong sum."""
    results = run_ranks(dying, 3, how, algorithm, timeout=40, may_die=(1,))
    assert results[1] is None
    for error, seconds in (results[0], results[2]):
        assert error.endswith("Error")
        assert seconds < SECONDS + 4
