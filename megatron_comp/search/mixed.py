# SPDX-License-Identifier: Apache-2.0
"""A codec for every place: sensitivities, the knapsack, and what its answers really do."""

from .bound import Bound
from .candidates import PRESETS, bits_per_value, items, policy_of, uniform
from .found import Found
from .measurements import Measurements
from .solve import Choice, Frontier
from .tune import tune


def search_mixed(
    measurements: Measurements, bound: Bound, candidates: tuple, algorithm: str, min_bytes: int | str
) -> Found:
    """The policy of fewest bits within the bound. Raises ValueError if no choice of candidates keeps it."""
    steps = 1 if algorithm == "gather_sum" else 2
    places = measurements.sensitivity(candidates)
    frontier = Frontier(items(places, candidates, measurements.judge.tokens, steps))

    def measure(picked: dict[tuple, Choice]) -> dict:
        policy = policy_of(picked, algorithm)
        what = f"{policy.codec} everywhere" if len(policy.codecs()) == 1 else "mixed"
        name = f"{what}, {bits_per_value(picked, places, steps):.3f} bits"
        return measurements.point(name, "mixed", policy, sum(choice.damage for choice in picked.values()))

    picked, point = tune(frontier, bound, measure)
    for codec in PRESETS:
        measurements.point(codec, "preset", uniform(codec, algorithm))
    values = steps * sum(place["values"] for place in places)
    curve = [(8 * cost / values, damage) for cost, damage in zip(*frontier.curve(), strict=True)]
    return Found(policy_of(picked, algorithm, min_bytes), point, bound, {"mixed": curve})
