# SPDX-License-Identifier: Apache-2.0
"""From sensitivities to the cheapest policy that really keeps the bound."""

import math
from collections.abc import Callable

from .bound import Bound
from .solve import Choice, Frontier

# A try is near enough that keeps the bound and uses at least this much of it.
NEAR = 0.97
AIM = 0.99
MAX_TRIES = 10


def tune(frontier: Frontier, bound: Bound, measure: Callable[[dict[tuple, Choice]], dict]) -> tuple[dict, dict]:
    """(choices, point) of least cost among those that `measure` finds within `bound`.

    Damages predict KL to some ten percent. So the predicted budget is moved, by the ratio of limit to measured cost and
    between budgets known to be too much and too little, until what is measured is just within the limit.

    Raises ValueError that names the best that can be reached if even the choices of least damage miss the bound.
    """
    low, high = frontier.least_damage, math.inf
    budget, within, tried = bound.first_budget, [], set()
    for _ in range(MAX_TRIES):
        budget = max(budget, frontier.least_damage)
        picked = frontier.cheapest(budget)
        names = tuple(choice.name for choice in picked.values())
        if names in tried:
            break
        tried.add(names)
        point = measure(picked)
        cost = bound.of(point)
        if cost <= bound.limit:
            within.append((picked, point))
            low = budget
            if cost >= NEAR * bound.limit:
                break
        else:
            high = budget
        budget = _next(budget, low, high, AIM * bound.limit / cost if cost > 0 else math.inf)
    if not within:
        picked = frontier.best()
        point = measure(picked)
        if bound.of(point) > bound.limit:
            raise ValueError(
                f"{bound} cannot be kept with these candidates: the best of them cost {bound.of(point):.4g} at "
                f"{point['bits_per_value']:.3f} bits per value; allow more, or give --codec with more bits"
            )
        within.append((picked, point))
    return min(within, key=lambda each: (total_cost(each[0]), each[1]["kl"]))


def total_cost(picked: dict[tuple, Choice]) -> int:
    return sum(choice.cost for choice in picked.values())


def _next(budget: float, low: float, high: float, ratio: float) -> float:
    """`budget` times `ratio`, or where that leaves what is still open between `low` and `high`, their middle."""
    wanted = budget * min(ratio, 4.0)
    if low < wanted < high:
        return wanted
    if high == math.inf or low >= high:
        return wanted
    return math.sqrt(low * high)
