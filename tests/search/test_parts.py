# SPDX-License-Identifier: Apache-2.0
"""The knapsack, the way to the bound, and the words of a policy: what needs no model."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_comp.commands.search_report import policy_text
from megatron_comp.policy import CompressionPolicy
from megatron_comp.predict.models import Model
from megatron_comp.predict.times import Job
from megatron_comp.search import solve, with_drop
from megatron_comp.search.bound import Bound
from megatron_comp.search.candidates import policy_of, policy_of_names, uniform
from megatron_comp.search.plot import draw
from megatron_comp.search.solve import Choice, Frontier
from megatron_comp.search.tune import tune
from megatron_comp.search.words import Words
from megatron_comp.wire.calibration import LINKS, Calibration, CodecCost, Link
from megatron_comp.wire.codec import Codec

CHOICES = st.lists(
    st.tuples(st.integers(1, 60), st.integers(0, 40)).map(lambda t: Choice(f"{t}", 16 * t[0], t[1] / 8)),
    min_size=1,
    max_size=4,
)
ITEMS = st.lists(CHOICES, min_size=1, max_size=5)


def by_brute_force(items, bound):
    """Least cost within the bound, of all combinations; None if there is none."""
    costs = [sum(c.cost for c in each) for each in itertools.product(*items) if sum(c.damage for c in each) <= bound]
    return min(costs, default=None)


@settings(max_examples=60, deadline=None)
@given(ITEMS, st.integers(0, 100))
def test_solver_equals_brute_force(items, bound):
    bound /= 8  # eighths are exact, so that a sum just within the bound is no matter of rounding
    picked = Frontier(dict(enumerate(items))).cheapest(bound)
    least = by_brute_force(items, bound)
    if least is None:
        assert picked is None
        return
    assert all(picked[number] in choices for number, choices in enumerate(items))
    assert sum(choice.damage for choice in picked.values()) <= bound
    assert sum(choice.cost for choice in picked.values()) == least


@settings(max_examples=60, deadline=None)
@given(ITEMS, st.integers(0, 100))
def test_the_least_damage_within_a_cost_equals_brute_force(items, allowed):
    cheapest = sum(min(choice.cost for choice in choices) for choices in items)
    allowed += cheapest
    picked = Frontier(dict(enumerate(items))).within(allowed)
    tried = [each for each in itertools.product(*items) if sum(choice.cost for choice in each) <= allowed]
    assert sum(choice.cost for choice in picked.values()) <= allowed
    assert sum(choice.damage for choice in picked.values()) == min(sum(c.damage for c in each) for each in tried)


@settings(max_examples=20, deadline=None)
@given(ITEMS, st.integers(0, 100))
def test_coarse_units_cost_at_most_one_an_item(items, bound):
    fine, solve.MAX_UNITS = solve.MAX_UNITS, 40
    try:
        frontier = Frontier(dict(enumerate(items)))
    finally:
        solve.MAX_UNITS = fine
    picked, least = frontier.cheapest(bound / 8), by_brute_force(items, bound / 8)
    assert (picked is None) == (least is None)
    if picked:
        assert sum(choice.damage for choice in picked.values()) <= bound / 8
        assert sum(choice.cost for choice in picked.values()) <= least + len(items) * frontier.unit


def frontier_of_bits(items=12):
    """Items of rising sensitivity; a bit more quarters the damage."""
    return Frontier(
        {n: [Choice(f"int{bits}", 16 * bits, (n + 1) * 4.0**-bits) for bits in range(2, 9)] for n in range(items)}
    )


@pytest.mark.parametrize("factor", [0.5, 0.7, 1.0, 1.3, 4.0])
def test_tune_uses_the_bound_and_keeps_it(factor):
    """Predictions that are wrong by a factor: as good an answer as from right ones."""
    frontier, measured = frontier_of_bits(), []

    def measure(picked):
        kl = factor * sum(choice.damage for choice in picked.values())
        measured.append({"kl": kl, "bits_per_value": sum(choice.cost for choice in picked.values()) / 16 / 12})
        return measured[-1]

    picked, point = tune(frontier, Bound("kl", 0.05), measure)
    assert 0.9 * 0.05 < point["kl"] <= 0.05
    assert len(measured) <= 6
    ideal = frontier.cheapest(0.05 / factor)
    assert sum(c.cost for c in picked.values()) <= 1.03 * sum(c.cost for c in ideal.values())


def test_tune_by_perplexity_and_unreachable():
    def measure(picked):
        kl = sum(choice.damage for choice in picked.values())
        return {"kl": kl, "nll": 3 + 2 * kl, "base_nll": 3.0, "bits_per_value": 1.0}

    _, point = tune(frontier_of_bits(), Bound("perplexity", 3.0), measure)
    assert 2.7 < 100 * math.expm1(point["nll"] - 3) <= 3  # a bit more on the next item and it is 3.09
    least = sum(n * 4.0**-8 for n in range(1, 13))
    with pytest.raises(ValueError, match=rf"KL <= 1e-05 cannot be kept .* best of them cost {least:.4g}"):
        tune(frontier_of_bits(), Bound("kl", 1e-5), measure)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(["gather_sum", "two_step"]))
def test_policy_says_what_was_picked(tmp_path_factory, data, algorithm):
    names = st.sampled_from(["int4:32:e5m3", "int8:64:fp16", "mxfp4"])
    steps = 1 if algorithm == "gather_sum" else 2
    picked = {
        (layer, site, step): Choice(data.draw(names), 1, 0.0)
        for layer in range(7)
        for site in ("attention", "mlp")
        for step in range(steps)
    }
    file = tmp_path_factory.mktemp("policy") / "policy.yaml"
    file.write_text(policy_text(policy_of(picked, algorithm, 4096), ["found by: a test, # and more"]))
    read = CompressionPolicy.from_file(file)
    assert (read.algorithm, read.min_bytes) == (algorithm, 4096)
    for layer, site, _ in picked:
        phases = read.codec_name(layer, site, "prefill").split(">")
        assert phases * (steps if len(phases) == 1 else 1) == [picked[layer, site, s].name for s in range(steps)]


def test_policy_says_which_blocks_drop():
    names = {(layer, site): "mxfp4" for layer in range(6) for site in ("attention", "mlp")}
    names |= {(layer, "attention"): "drop" for layer in (1, 2, 5)} | {(5, "mlp"): "none"}
    policy = policy_of_names(names, "gather_sum")
    drop = {"attention": "drop"}
    assert (policy.codec, policy.sites) == ("mxfp4", {}) and policy.layers == {"1-2": drop, 5: drop | {"mlp": "none"}}
    everywhere = policy_of_names({name: "drop" if name[1] == "attention" else "mxfp4" for name in names}, "two_step")
    assert all(map(everywhere.drops, range(6))) and everywhere.codec_name(3, "mlp", "prefill") == "mxfp4"


@pytest.mark.parametrize("algorithm", ["gather_sum", "two_step"])
def test_blocks_take_the_least_time_of_all_combinations(algorithm):
    """Two layers, two codecs, one layer that can be dropped in two ways: against every combination, times by hand."""
    model = Model(layers=2, hidden=64, ffn=128, heads=4, kv_heads=2, head_dim=16, vocab=100)
    calibration = Calibration(dict.fromkeys(LINKS, Link(1e6, 1e-4)), {}, 0.1, {"ranks": 2, "device": "cpu"})
    codecs = tuple(map(Codec.parse, ("int4:32:fp16", "int8:32:fp16")))
    nbytes = {"none": 2 * 16 * 64 * 4 // 2} | {str(codec): codec.message_bytes((16, 64)) for codec in codecs}
    half = {str(codec): codec.message_bytes((8, 64)) for codec in codecs}
    places = [
        {"layer": layer, "site": site, "damage": [[8 * n, n], [4 * n, 2 * n]], "joined": [[9 * n, 2 * n], [3 * n, n]]}
        for n, (layer, site) in enumerate(itertools.product((0, 1), ("attention", "mlp")), 1)
    ]
    drops = {1: [(False, 3.0), (True, 1.0)]}
    steps = 1 if algorithm == "gather_sum" else 2

    def words(damages):
        """(seconds, damage) of one sum. Damages are of 10 tokens."""
        yield nbytes["none"] / 1e6 + 1e-4, 0.0
        for phases in itertools.product(range(2), repeat=steps):
            sizes = [(nbytes if steps == 1 else half)[str(codecs[n])] for n in phases]
            yield sum(sizes) / 1e6 + steps * 1e-4, sum(damages[s][n] for s, n in enumerate(phases)) / 10

    def blocks(layer):
        attention, mlp = places[2 * layer : 2 * layer + 2]
        for (a, b), (c, d) in itertools.product(words(attention["damage"]), words(mlp["damage"])):
            yield a + c, b + d
        for _, kl in drops.get(layer, ()):
            for a, b in words(mlp["joined"]):
                yield a, kl + b

    found = with_drop.items(places, Words(codecs, algorithm, Job(model, 2, 1, 16, 4), calibration), 10, drops)
    frontier, dropped = Frontier(found), set()
    for bound in (0.05, 0.5, 1.2, 1.6, 3.5, 8.0):
        picked = frontier.cheapest(bound)
        least = min(s + t for (s, x), (t, y) in itertools.product(blocks(0), blocks(1)) if x + y <= bound)
        # Costs are rounded up to units of a 60000th of what they span.
        assert sum(choice.cost for choice in picked.values()) / 1e9 == pytest.approx(least, rel=1e-4)
        assert sum(choice.damage for choice in picked.values()) <= bound
        dropped.add((picked[1].name[0] == "drop", picked[1].name[2]))
    assert (True, True) in dropped and (False, False) in dropped


def test_what_has_no_measured_time_is_no_candidate_and_has_no_place_among_times(tmp_path):
    model = Model(layers=2, hidden=64, ffn=128, heads=4, kv_heads=2, head_dim=16, vocab=100)
    fast, slow, unknown = codecs = tuple(map(Codec.parse, ("int4:32:fp16", "int8:32:fp16", "mxfp4")))
    costs = {str(fast): CodecCost(encode_fixed_s=1e-6), str(slow): CodecCost(encode_fixed_s=1e-3)}
    calibration = Calibration(dict.fromkeys(LINKS, Link(1e6, 1e-4)), costs, 0.1, {"ranks": 2, "device": "cpu"})
    words = Words(codecs, "gather_sum", Job(model, 2, 1, 16, 4), calibration)
    assert [choice.name for choice in words.choices([[9, 8, 7], [0, 0, 0]], 10)] == [str(fast), str(slow), "none"]
    assert words.seconds(uniform(str(fast), "gather_sum")) == pytest.approx(
        4 * (1e-4 + 1e-6 + fast.message_bytes((16, 64)) / 1e6)
    )
    policy = CompressionPolicy(codec=str(fast), sites={"mlp": "mxfp4>int8:32:fp16"}, algorithm="two_step")
    assert words.seconds(policy) is None and words.untimed(policy) == [str(unknown)]

    places = {"a": 1.0, "b": 2.0, "mxfp4": None}
    rows = [{"name": n, "kind": "preset", "kl": 0.1, "chosen": "", "sums_ms": ms} for n, ms in places.items()]
    draw(rows, {}, None, "a model", tmp_path / "figure.svg", "sums_ms")
    assert "mxfp4: time not measured" in (tmp_path / "figure.svg").read_text()


def test_policy_is_short():
    picked = {(layer, site, 0): Choice("mxfp4", 1, 0.0) for layer in range(30) for site in ("attention", "mlp")}
    picked |= {(layer, "mlp", 0): Choice("mxfp8", 1, 0.0) for layer in (0, 1, 2, 29)}
    policy = policy_of(picked, "gather_sum")
    assert policy.codec == "mxfp4" and not policy.sites
    assert policy.layers == {"0-2": {"mlp": "mxfp8"}, 29: {"mlp": "mxfp8"}}
