# SPDX-License-Identifier: Apache-2.0
"""`Reducer`: what it counts, to the byte, what it keeps and why, and when it refuses to train."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from megatron_comp.inference import cpu
from megatron_comp.layers.meter import ModelStats, SiteStats, Traffic
from megatron_comp.layers.reducer import Phase, Reducer
from megatron_comp.policy import CompressionPolicy
from megatron_comp.wire.codec import Codec

RANKS = 3
HIDDEN = 96


def mxfp4_bytes(rows):
    """4 bits per value and a byte for each 32 of them, each section padded to 16 bytes."""
    return sum(-(-nbytes // 16) * 16 for nbytes in (rows * HIDDEN // 2, rows * HIDDEN // 32))


def int8_bytes(rows):
    return sum(-(-nbytes // 16) * 16 for nbytes in (rows * HIDDEN, rows * HIDDEN // 32 * 2))


# name -> (policy, rows, method, phase); 7 rows are slices of 3, 2 and 2.
CASES = {
    "gather_sum": ({"codec": "mxfp4", "algorithm": "gather_sum"}, 7, "reduce", "prefill"),
    "two_step": ({"codec": "mxfp4", "algorithm": "two_step"}, 7, "reduce", "prefill"),
    "fewer_rows_than_ranks": ({"codec": "mxfp4", "algorithm": "two_step"}, 2, "reduce", "prefill"),
    "pair": ({"codec": "mxfp4>int8:32:fp16"}, 7, "reduce", "prefill"),
    "scatter": ({"codec": "mxfp4"}, 6, "reduce_scatter", "prefill"),
    "policy": ({"codec": "none"}, 7, "reduce", "prefill"),
    "policy_scatter": ({"codec": "none"}, 6, "reduce_scatter", "prefill"),
    "phase": ({"codec": "mxfp4", "phases": {"decode": "none"}}, 7, "reduce", "decode"),
    "phase_codec": (
        {"codec": "int8:32:fp16", "algorithm": "gather_sum", "phases": {"decode": "mxfp4"}},
        7,
        "reduce",
        "decode",
    ),
    "min_bytes": ({"codec": "mxfp4", "min_bytes": 7 * HIDDEN * 4 + 1}, 7, "reduce", "prefill"),
    "min_bytes_scatter": ({"codec": "mxfp4", "min_bytes": 6 * HIDDEN * 4 + 1}, 6, "reduce_scatter", "prefill"),
    "layer": ({"codec": "mxfp4", "layers": {5: "none"}}, 7, "reduce", "prefill"),
    "site": ({"codec": "mxfp4", "sites": {"mlp": "none"}}, 7, "reduce", "prefill"),
}


def counted(rank, world_size):
    """name -> (stats of two calls, result of the second, the stock sum)."""
    cpu.prepare()
    group, made = dist.group.WORLD, {}
    for name, (words, rows, method, phase) in CASES.items():
        torch.manual_seed(rank)
        policy = CompressionPolicy(**{"min_bytes": 0} | words)
        reducer = Reducer(policy, 5, "mlp", group, Phase(phase), timing=name in ("gather_sum", "policy"))
        x = torch.randn(rows, HIDDEN)
        total = x.clone()
        dist.all_reduce(total)
        if method == "reduce_scatter":
            total = total.chunk(world_size)[rank]
        for _ in range(2):
            result = reducer(x.clone(), scatter=method == "reduce_scatter")
        made[name] = reducer.meter.stats, result, total
    return made


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(counted, RANKS)


# name -> (message bytes, bytes that a rank with so many rows in its slice receives), a call
COMPRESSED = {
    "gather_sum": (mxfp4_bytes(7), lambda rows: 2 * mxfp4_bytes(7)),
    "two_step": (mxfp4_bytes(7), lambda rows: 2 * mxfp4_bytes(rows) + 2 * mxfp4_bytes(3)),
    "fewer_rows_than_ranks": (mxfp4_bytes(2), lambda rows: 2 * mxfp4_bytes(rows) + 2 * mxfp4_bytes(1)),
    "pair": ((mxfp4_bytes(7) + int8_bytes(7)) // 2, lambda rows: 2 * mxfp4_bytes(rows) + 2 * int8_bytes(3)),
    "scatter": (mxfp4_bytes(6), lambda rows: 2 * mxfp4_bytes(2)),
    "phase_codec": (mxfp4_bytes(7), lambda rows: 2 * mxfp4_bytes(7)),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_traffic_to_the_byte(ranks, name):
    message, received = COMPRESSED[name]
    rows = CASES[name][1]
    for rank, made in enumerate(ranks):
        stats, result, total = made[name]
        of_rank = rows // RANKS + (rank < rows % RANKS)
        expected = Traffic(2, 2 * rows * HIDDEN, 2 * message, 2 * received(of_rank), stats.compressed.seconds)
        assert stats.compressed == expected
        assert stats.kept == Traffic() and not stats.kept_because
        assert (stats.layer, stats.site) == (5, "mlp")
        assert not torch.equal(result, total)


@pytest.mark.parametrize("name", sorted(CASES.keys() - COMPRESSED.keys()))
def test_kept_traffic_and_why(ranks, name):
    _, rows, method, _ = CASES[name]
    nbytes = rows * HIDDEN * 4
    ring = 2 * nbytes * (2 if method == "reduce" else 1) // RANKS
    reason = "min_bytes" if name.startswith("min_bytes") else "policy"
    for made in ranks:
        stats, result, total = made[name]
        assert stats.kept == Traffic(2, 2 * rows * HIDDEN, 2 * nbytes, 2 * ring, stats.kept.seconds)
        assert dict(stats.kept_because) == {reason: 2}
        assert stats.compressed == Traffic()
        assert torch.equal(result, total)


def test_seconds_are_taken_when_asked_for(ranks):
    for made in ranks:
        assert made["gather_sum"][0].compressed.seconds > 0
        assert made["policy"][0].kept.seconds > 0
        assert made["two_step"][0].compressed.seconds is None
        assert made["min_bytes"][0].kept.seconds is None


def one_rank(rank, world_size):
    def refuse(*_):
        raise AssertionError("encoded with one rank")

    Codec.encode = refuse
    made = []
    for method in ("reduce", "reduce_scatter"):
        reducer = Reducer(CompressionPolicy(codec="mxfp4", min_bytes=0), 0, "attention", dist.group.WORLD)
        x = torch.randn(3, HIDDEN)
        result = reducer(x, scatter=method == "reduce_scatter")
        made.append((result.data_ptr() == x.data_ptr(), reducer.meter.stats))
    return made


def test_one_rank_gets_its_partial_back():
    for untouched, stats in run_ranks(one_rank, 1)[0]:
        assert untouched
        assert stats.kept == Traffic(1, 3 * HIDDEN, 3 * HIDDEN * 4, 0)
        assert dict(stats.kept_because) == {"one rank": 1}


def train(rank, world_size):
    """(what a reduction said, whether its result has a gradient) in and out of training."""
    cpu.prepare()

    def outcome(method="reduce", training=True, requires_grad=True, grad=True, allow=False, codec="mxfp4"):
        policy = CompressionPolicy(codec=codec, min_bytes=0)
        reducer = Reducer(policy, 7, "mlp", dist.group.WORLD, allow_training=allow)
        x = torch.randn(6, HIDDEN, requires_grad=requires_grad) * 1
        with torch.set_grad_enabled(grad):
            try:
                total = reducer(x, method == "reduce_scatter", training)
                return total.requires_grad, reducer.meter.stats.compressed.calls
            except RuntimeError as error:
                return str(error), reducer.meter.stats.compressed.calls

    return [
        {
            "training": outcome(method),
            "allowed": outcome(method, allow=True),
            "no_grad": outcome(method, grad=False),
            "eval": outcome(method, training=False),
            "frozen": outcome(method, requires_grad=False),
            "stock": outcome(method, codec="none"),
        }
        for method in ("reduce", "reduce_scatter")
    ]


def test_training_is_refused_unless_asked_for():
    for methods in run_ranks(train, 2):
        for made in methods:
            refused, calls = made.pop("training")
            assert "layer 7 mlp" in refused and "model.eval()" in refused and "allow_training=True" in refused
            assert calls == 0
            assert made == {
                "allowed": (True, 1),
                "no_grad": (False, 1),
                "eval": (True, 1),
                "frozen": (False, 1),
                "stock": (True, 0),
            }


def test_a_model_adds_up_its_sites():
    first = SiteStats(0, "mlp", Traffic(1, 100, 50, 20, 0.5), Traffic(2, 10, 40, 3, 0.25))
    second = SiteStats(1, "mlp", Traffic(3, 200, 100, 70, 1.0), Traffic(1, 40, 160, 9, 0.0))
    first.kept_because.update({"policy": 2})
    second.kept_because.update({"policy": 1, "min_bytes": 5})
    stats = ModelStats([first, second])
    assert stats.compressed == Traffic(4, 300, 150, 90, 1.5)
    assert stats.kept == Traffic(3, 50, 200, 12, 0.25)
    assert stats.kept_because == {"policy": 3, "min_bytes": 5}
    assert stats.bits_per_value == 8 * 350 / 350
    assert ModelStats([]).bits_per_value == 0 and ModelStats([]).compressed == Traffic()
