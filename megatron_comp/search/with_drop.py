# SPDX-License-Identifier: Apache-2.0
"""`search --with-drop`: for every block a codec for each of its sums, or attention's left out; least predicted time.

An item of the knapsack is a block: a word for its attention (a codec, `none`, or `drop` with the model's own or with
distilled weights) and one for its MLP. Its cost is the predicted time of its sums, and its damage a sum of

    kept       what rounding attention's sum and the MLP's costs, from the sensitivities
    dropped    the KL that was measured of the model with this block's sum alone dropped, and what rounding the one
               message costs that carries both partial sums

Damages of dropped blocks add up worse than those of roundings, which have no direction in common: so, as everywhere in
the search, the choice counts by what is measured of it. The best policy without drops is found and measured too; where
drops gain nothing, it is the answer.
"""

from ..layers.sync_drop import check_block
from ..policy import DROP, CompressionPolicy
from ..spd.blocks import layers_that_drop
from .bound import Bound
from .candidates import PRESETS, policy_of_names, uniform
from .found import Found
from .measurements import Measurements
from .solve import Choice, Frontier
from .tune import total_cost, tune
from .words import NS, Words


def search_with_drop(measurements: Measurements, bound: Bound, words: Words, min_bytes: int | str) -> Found:
    """The policy of least predicted time within the bound. Raises ValueError for a model that can drop no sum."""
    droppable = blocks_that_can(measurements.judge.model)
    places = measurements.sensitivity(words.candidates, joined=True)
    drops = measured_drops(measurements, droppable)
    with_drops = Frontier(items(places, words, measurements.judge.tokens, drops))
    without = Frontier(items(places, words, measurements.judge.tokens, {}))

    def measure(picked: dict[int, Choice]) -> dict:
        policy, distilled = _policy(picked, words.algorithm), _distilled(picked)
        dropped = sum(policy.drops(layer) for layer in picked)
        name = f"{dropped} dropped" + (f", {len(distilled)} distilled" if distilled else "") if dropped else "no drop"
        damage = sum(choice.damage for choice in picked.values())
        return measurements.point(name, "mixed+drop" if dropped else "mixed", policy, damage, distilled)

    found = [tune(frontier, bound, measure) for frontier in (without, with_drops)]
    picked, point = min(found, key=lambda each: (total_cost(each[0]), each[1]["kl"]))
    for codec in PRESETS:
        measurements.point(codec, "preset", uniform(codec, words.algorithm))
    return Found(
        policy=_policy(picked, words.algorithm, min_bytes),
        point=point,
        bound=bound,
        curves={"no drop": _curve(without), "with drops": _curve(with_drops)},
        distilled=_distilled(picked),
        words=words,
    )


def blocks_that_can(model) -> list[int]:
    """Layers whose attention's sum can be left out. Raises ValueError with the first one's reason if there are none."""
    able, reasons = [], []
    for layer in model.decoder.layers:
        try:
            check_block(layer, layer.layer_number - 1)
            able.append(layer.layer_number - 1)
        except ValueError as error:
            reasons.append(str(error))
    if not able:
        raise ValueError(f"--with-drop: {reasons[0].removeprefix('policy: ')}")
    return able


def measured_drops(measurements: Measurements, blocks: list[int]) -> dict[int, list[tuple[bool, float]]]:
    """By block, (distilled, KL with its sum alone dropped): with the model's own weights, and with distilled ones."""
    drops: dict[int, list[tuple[bool, float]]] = {}
    for block in reversed(blocks):  # from the last on, as `drop sensitivity` walks
        policy = CompressionPolicy(layers=layers_that_drop([block]))
        point = measurements.point(f"block {block} dropped", "block dropped", policy)
        drops[block] = [(False, point["kl"])]
        if measurements.judge.overrides and block in measurements.judge.overrides.blocks:
            name = f"block {block} distilled"
            point = measurements.point(name, "block distilled", policy, distilled=[block])
            drops[block].append((True, point["kl"]))
    return drops


def items(
    places: list[dict], words: Words, tokens: int, drops: dict[int, list[tuple[bool, float]]]
) -> dict[int, list[Choice]]:
    """By layer its choices, each named (attention's word, the MLP's word, whether with distilled weights).

    places: of `Measurements.sensitivity`. drops: of `measured_drops`.
    """
    sites = {(place["layer"], place["site"]): place for place in places}
    made = {}
    for layer in sorted({layer for layer, _ in sites}):
        attention, mlp = sites[layer, "attention"], sites[layer, "mlp"]
        choices = [
            Choice((first.name, second.name, False), first.cost + second.cost, first.damage + second.damage)
            for first in words.choices(attention["damage"], tokens)
            for second in words.choices(mlp["damage"], tokens)
        ]
        choices += [
            Choice((DROP, word.name, distilled), word.cost, kl + word.damage)
            for distilled, kl in drops.get(layer, ())
            for word in words.choices(mlp["joined"], tokens)
        ]
        made[layer] = choices
    return made


def _policy(picked: dict[int, Choice], algorithm: str, min_bytes: int | str = 0) -> CompressionPolicy:
    names = {}
    for layer, choice in picked.items():
        names[layer, "attention"], names[layer, "mlp"], _ = choice.name
    return policy_of_names(names, algorithm, min_bytes)


def _distilled(picked: dict[int, Choice]) -> list[int]:
    return [layer for layer, choice in picked.items() if choice.name[2]]


def _curve(frontier: Frontier) -> list[tuple[float, float]]:
    """(milliseconds, predicted KL) of the best trades."""
    return [(cost / NS * 1e3, damage) for cost, damage in zip(*frontier.curve(), strict=True)]
