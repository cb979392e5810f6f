# SPDX-License-Identifier: Apache-2.0
"""Ranks of predictors by sum: no more work than is allowed, and spent where it is missed least."""

from itertools import product

import pytest

from megatron_comp.search.trim import FIXED, Fitted

RANKS = [0, 7, 15, 23]


def traced(weight, *left):
    return {"weight": weight, "ranks": RANKS, "left": list(left)}


TRACES = {
    (0, "attention"): traced(0.2, 1.0, 0.1, 0.05, 0.04),
    (0, "mlp"): traced(0.1, 1.0, 0.9, 0.6, 0.3),
    (1, "attention"): traced(0.05, 1.0, 0.8, 0.7, 0.65),
    (1, "mlp"): None,
}


def cost(ranks):
    return sum(rank + FIXED for rank in ranks.values() if rank)


def damage(ranks):
    return sum(
        known["weight"] * known["left"][RANKS.index(ranks[key])] for key, known in TRACES.items() if known is not None
    )


@pytest.mark.parametrize("columns", [10, 39, 60, 100, 140, 500])
def test_the_ranks_of_least_damage_within_the_work(columns):
    chosen = Fitted(TRACES, 0.001).choose(0.001 * columns)
    others = (dict(zip(TRACES, (*ranks, 0), strict=True)) for ranks in product(RANKS, repeat=3))
    assert chosen[1, "mlp"] == 0 and cost(chosen) <= columns
    assert damage(chosen) == min(damage(ranks) for ranks in others if cost(ranks) <= columns)


def test_all_that_there_is_where_work_is_not_short():
    assert Fitted(TRACES, 0.001).choose(1.0) == {key: 23 if known else 0 for key, known in TRACES.items()}


def test_one_that_does_not_help_is_left_out():
    assert Fitted({(0, "mlp"): traced(1.0, 1.0, 1.1, 1.2, 1.3)}, 0.001).choose(1.0) == {(0, "mlp"): 0}
