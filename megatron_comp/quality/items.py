# SPDX-License-Identifier: Apache-2.0
"""Files of multiple-choice items that a model has scored: JSON lines, a header and then one line per item."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from ..files import shown, write_text

HEADER = ("model", "policy", "setting", "tp", "dtype", "versions", "command")


@dataclass(frozen=True, slots=True)
class Item:
    """choices: log-probability of each choice, summed over its tokens, in nats. lengths: of each, in characters.

    gold: number of the right choice.
    """

    choices: tuple[float, ...]
    lengths: tuple[int, ...]
    gold: int

    def right(self, per_character: bool = False) -> bool:
        """Whether the right choice has the highest score; the first of equals counts as the highest."""
        scores = self.scores(per_character)
        return scores.index(max(scores)) == self.gold

    def margin(self, per_character: bool = False) -> float:
        """Score of the right choice less the best other one's."""
        scores = self.scores(per_character)
        return scores[self.gold] - max(scores[: self.gold] + scores[self.gold + 1 :])

    def scores(self, per_character: bool) -> tuple[float, ...]:
        """Log-probabilities, in nats, or nats per character."""
        return tuple(map(float.__truediv__, self.choices, self.lengths)) if per_character else self.choices


@dataclass(frozen=True)
class Run:
    """A file of items. header: what its first line holds. items: by task and number or name."""

    path: str
    header: dict
    items: dict[tuple[str, int | str], Item]

    @property
    def setting(self) -> str:
        return self.header["setting"]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for task, _ in self.items))


def read_items(path: str | Path) -> Run:
    """Raises ValueError that names file and line for what is no such file, OSError if it cannot be opened."""
    items: dict[tuple[str, int | str], Item] = {}
    header = None
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                said = json.loads(line)
                if not isinstance(said, dict):
                    raise ValueError("not a JSON object")
                if header is None:
                    header = _header(said)
                    continue
                key, item = _item(said)
                if key in items:
                    raise ValueError(f"task {key[0]} has item {key[1]} twice")
                items[key] = item
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not items:
        raise ValueError(f"{path} holds no items")
    return Run(str(path), header, items)


def write_items(path: str | Path, header: dict, items: list[dict]) -> None:
    """header: what `HEADER` names. items: with `task`, `item` and what an `Item` holds. Whole or not there."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in [{"kind": "items", **header}, *items]))


def _header(said: dict) -> dict:
    if said.get("kind") != "items":
        raise ValueError('the first line of an items file has "kind": "items"')
    if missing := [key for key in HEADER if key not in said]:
        raise ValueError(f"the header lacks {', '.join(missing)}")
    return {**said, **{key: str(said[key]) for key in ("model", "setting", "dtype", "command")}}


def _item(said: dict) -> tuple[tuple[str, int | str], Item]:
    task, number = said.get("task"), said.get("item")
    if not isinstance(task, str) or not isinstance(number, (int, str)):
        raise ValueError(f"task {shown(task)} and item {shown(number)}: expected a name, and a number or a name")
    where = f"task {shown(task)}, item {shown(number)}"
    choices, lengths, gold = said.get("choices"), said.get("lengths"), said.get("gold")
    if not _numbers(choices, (int, float)) or len(choices) < 2:
        raise ValueError(f"{where}: choices {shown(choices)}: at least two log-probabilities are needed")
    if not all(map(math.isfinite, choices)):
        raise ValueError(f"{where}: log-probabilities {shown(choices)} are not finite")
    if not _numbers(lengths, int) or len(lengths) != len(choices) or min(lengths) < 1:
        raise ValueError(f"{where}: lengths {shown(lengths)}: expected {len(choices)} numbers of characters")
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError(f"{where}: gold {shown(gold)} is not the number of a choice: there are {len(choices)}")
    return (task, number), Item(tuple(map(float, choices)), tuple(lengths), gold)


def _numbers(found: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(found, list) and all(isinstance(x, kind) and not isinstance(x, bool) for x in found)
