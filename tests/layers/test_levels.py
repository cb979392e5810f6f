# SPDX-License-Identifier: Apache-2.0
"""Hierarchical sums in a model: machines by name or from the policy, what is counted, and that logits are right."""

import socket

import pytest
import torch
from checkpoints import tiny_llama
from models import all_logits, policy
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference.generate import logits
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.wire.topology import Islands

MACHINES = ["left", "left", "right", "right"]


def models(rank, world_size, folder):
    """{name: (logits, algorithms, bytes received)} of a model of which half of the ranks are on another machine."""
    init_parallel(world_size)
    model, made = build_model(folder), {}
    for name, machines, words in (
        ("two_step", MACHINES, {"algorithm": "two_step"}),
        ("hierarchical", MACHINES, {"algorithm": "hierarchical"}),
        ("again", MACHINES, {"algorithm": "hierarchical"}),
        ("one machine", ["left"] * 4, {"algorithm": "hierarchical"}),
        ("a rank each", ["a", "b", "c", "d"], {"algorithm": "hierarchical"}),
        ("islands", ["left"] * 4, {"algorithm": "hierarchical", "islands": [[0, 1], [2, 3]]}),
        ("auto", MACHINES, {"algorithm": "auto"}),
    ):
        socket.gethostname = lambda machines=machines: machines[rank]
        mc.apply_compression(model, policy(codec="int8:32:fp16", min_bytes=0, **words))
        result, stats = all_logits(model), mc.stats(model)
        made[name] = result, dict(stats.algorithms), stats.compressed.received_bytes
    mc.remove_compression(model)
    made["stock"] = all_logits(model), {}, 0

    parallel, ids = build_model(folder, sequence_parallel=True), torch.arange(8)[None]
    socket.gethostname = lambda: MACHINES[rank]
    for name, algorithm in (("scatter", "two_step"), ("hierarchical scatter", "hierarchical")):
        mc.apply_compression(parallel, policy(codec="int8:32:fp16", min_bytes=0, algorithm=algorithm))
        made[name] = logits(parallel, ids, gather=True), dict(mc.stats(parallel).algorithms), 0
    mc.remove_compression(parallel)
    made["stock scatter"] = logits(parallel, ids, gather=True), {}, 0
    return made


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    return tiny_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=2, **heads)


@pytest.fixture(scope="module")
def made(checkpoint):
    return run_ranks(models, 4, checkpoint)


def test_all_ranks_have_the_same_logits(made):
    for name in made[0]:
        assert all(torch.equal(made[0][name][0], each[name][0]) for each in made), name


def test_sums_go_by_level_where_there_are_two(made):
    for name, expected in {
        "two_step": {"two_step"},
        "hierarchical": {"hierarchical"},
        "islands": {"hierarchical"},
        "one machine": {"gather_sum"},
        "a rank each": {"gather_sum"},
        "scatter": {"reduce_scatter"},
        "hierarchical scatter": {"hierarchical_scatter"},
    }.items():
        assert set(made[0][name][1]) == expected, name
    assert torch.equal(made[0]["hierarchical"][0], made[0]["islands"][0])
    assert torch.equal(made[0]["hierarchical"][0], made[0]["again"][0])


def test_fewer_roundings_are_nearer_to_stock(made):
    """Two sums are rounded, once, in place of four sums twice."""
    of_first = made[0]
    for stock, flat, by_level in (
        ("stock", "two_step", "hierarchical"),
        ("stock scatter", "scatter", "hierarchical scatter"),
    ):
        error = {name: (of_first[name][0] - of_first[stock][0]).norm() for name in (flat, by_level)}
        assert 0 < error[by_level] < error[flat]


def refused(rank, world_size, folder):
    init_parallel(world_size)
    model = build_model(folder)
    try:
        mc.apply_compression(model, policy(algorithm="hierarchical", islands=[[0, 1], [2]]))
    except ValueError as error:
        return str(error), list(mc.stats(model).sites)


def test_islands_that_do_not_fit_are_refused_before_anything_is_changed(checkpoint):
    for said, sites in run_ranks(refused, 2, checkpoint):
        assert said == "policy: islands: [[0, 1], [2]] are of 3 ranks, the group is of 2" and sites == []


def test_the_face_names_islands():
    assert mc.Islands is Islands
