# SPDX-License-Identifier: Apache-2.0
"""One choice for each item, at the least cost under a bound on the sum of their damages: a multiple-choice knapsack.

Solved for all bounds at once by dynamic programming over the total cost: the least damage that so many units buy,
item by item. Exact while costs are multiples of a unit of which the total takes no more than MAX_UNITS; else costs are
rounded up to larger units, and what is found costs at most a unit an item too much.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

# Of 120 items (60 sums, two phases) this rounds costs by at most 0.2 % of what the cheapest and dearest lie apart.
MAX_UNITS = 60_000


@dataclass(frozen=True)
class Choice:
    """What an item may be: `name` for whoever reads the answer, `cost` in any unit, `damage` in nats per token."""

    name: Hashable
    cost: int
    damage: float


class Frontier:
    """Every best trade of cost for damage. items: for each key the choices that it has."""

    def __init__(self, items: dict[object, list[Choice]]) -> None:
        self.keys = list(items)
        self._choices = [undominated(choices) for choices in items.values()]
        self._least = sum(choices[0].cost for choices in self._choices)
        spans = [[choice.cost - choices[0].cost for choice in choices] for choices in self._choices]
        self.unit = max(math.gcd(*(cost for span in spans for cost in span)), 1)
        total = sum(span[-1] for span in spans)
        if total > MAX_UNITS * self.unit:
            self.unit = math.ceil(total / MAX_UNITS)
        self._units = [[-(-cost // self.unit) for cost in span] for span in spans]
        self._fill(sum(units[-1] for units in self._units) + 1)

    def _fill(self, states: int) -> None:
        """`damage[u]`: the least at `u` units or fewer; `_taken[item][u]`: which choice the best at exactly so many
        units of this and the earlier items ends with."""
        damage = np.zeros(states)  # nothing chosen yet costs nothing, and may leave units unused
        self._taken = np.zeros((len(self.keys), states), dtype=np.uint16)
        for taken, choices, units in zip(self._taken, self._choices, self._units, strict=True):
            best = np.full(states, np.inf)
            for number, (choice, cost) in enumerate(zip(choices, units, strict=True)):
                with_it = damage[: states - cost] + choice.damage
                better = with_it < best[cost:]
                best[cost:][better] = with_it[better]
                taken[cost:][better] = number
            damage = best
        self.damage = damage

    @property
    def least_damage(self) -> float:
        return float(self.damage[-1])

    def cheapest(self, bound: float) -> dict[object, Choice] | None:
        """The choices of least cost whose damages sum to `bound` or less; None if there are none."""
        # Damage never rises with units.
        units = int(np.searchsorted(-self.damage, -bound, side="left"))
        return None if units == len(self.damage) else self._chosen(units)

    def within(self, cost: int) -> dict[object, Choice]:
        """The choices of least damage that cost so much or less; the cheapest ones where none cost as little."""
        units = min(max((cost - self._least) // self.unit, 0), len(self.damage) - 1)
        picked = self.cheapest(float(self.damage[units]))
        assert picked is not None
        return picked

    def best(self) -> dict[object, Choice]:
        """The choices of least damage, at the least cost of these."""
        return self.cheapest(self.least_damage)

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """(costs, least damages) of every trade."""
        return self._least + self.unit * np.arange(len(self.damage)), self.damage

    def _chosen(self, units: int) -> dict[object, Choice]:
        picked = {}
        for item in reversed(range(len(self.keys))):
            number = self._taken[item][units]
            picked[self.keys[item]] = self._choices[item][number]
            units -= self._units[item][number]
        return {key: picked[key] for key in self.keys}


def undominated(choices: list[Choice]) -> list[Choice]:
    """By rising cost and falling damage."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.cost, choice.damage)):
        if not kept or choice.damage < kept[-1].damage:
            kept.append(choice)
    return kept
