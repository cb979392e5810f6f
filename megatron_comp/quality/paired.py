# SPDX-License-Identifier: Apache-2.0
"""Answers of a model under a setting beside those of the same model uncompressed: the same items, so paired statistics.

Accuracy hides what changes: as many answers may turn right as turn wrong. Flips count both.
"""

import numpy as np

from ..files import shown
from .bootstrap import LEVEL, ends, intervals, means
from .items import Run

# The harness's names: the summed log-probability decides, or that per character.
SCORES = {"acc": False, "acc_norm": True}
ALL = "all tasks"


def compare(base: Run, said: Run) -> list[dict]:
    """A row for each task and score, and, of several tasks, for all items together:

    `setting`, `task`, `score`, `items`, `accuracy_none`, `accuracy`; `accuracy_change`, `flips` (the share of items
    whose answer turned wrong or right) and `margin_change` (mean change of the right choice's lead on the best other
    one, in nats, or nats per character), each with `_low` and `_high` of a 95 % interval; `to_wrong` and `to_right`
    (numbers of items), and `mcnemar_p` (exact, two-sided: could chance alone make the two so unlike?).

    Intervals of changes are those of a paired bootstrap. That of a share of flips is exact (Clopper-Pearson), and so
    has a width where no answer flipped, too.

    Raises ValueError if the runs are of different models or items.
    """
    _check(base, said)
    tasks = [[task] for task in base.tasks]
    if len(tasks) > 1:
        tasks.append(base.tasks)
    rows = []
    for group in tasks:
        keys = [key for key in base.items if key[0] in group]
        name = group[0] if len(group) == 1 else ALL
        for score, per_character in SCORES.items():
            pairs = [(base.items[key], said.items[key]) for key in keys]
            right, margin = (
                np.array([[getattr(item, what)(per_character) for item in pair] for pair in pairs], dtype=float).T
                for what in ("right", "margin")
            )
            rows.append({"setting": said.setting, "task": name, "score": score, **_figures(right, margin)})
    return rows


def together(rows: list[dict], score: str) -> list[dict]:
    """Of rows of `compare` by one score, those of all tasks together; of runs of one task, that task's."""
    of_score = [row for row in rows if row["score"] == score]
    return [row for row in of_score if row["task"] == ALL] or of_score


def _figures(right: np.ndarray, margin: np.ndarray) -> dict:
    """right, margin: float64 `[2, items]`, without and with the setting."""
    from scipy import stats

    change = right[1] - right[0]
    of_items = np.stack([change, margin[1] - margin[0]])
    low, high = intervals(means(of_items), len(change), len(of_items))
    to_wrong, to_right = int((change < 0).sum()), int((change > 0).sum())
    row = {"items": len(change), "accuracy_none": float(right[0].mean()), "accuracy": float(right[1].mean())}
    for place, name in enumerate(("accuracy_change", "margin_change")):
        row |= {name: float(of_items[place].mean()), **ends(name, low[place], high[place])}
    flips = stats.binomtest(to_wrong + to_right, len(change))
    row |= {"flips": float(flips.statistic), **ends("flips", *flips.proportion_ci(LEVEL))}
    return row | {"to_wrong": to_wrong, "to_right": to_right, "mcnemar_p": mcnemar(to_wrong, to_right)}


def mcnemar(to_wrong: int, to_right: int) -> float:
    """McNemar's exact test, two-sided: how likely so uneven a split of the flips is if both ways are equally likely."""
    from scipy import stats

    return float(stats.binomtest(to_wrong, to_wrong + to_right).pvalue) if to_wrong + to_right else 1.0


def _check(base: Run, said: Run) -> None:
    if base.header["model"] != said.header["model"]:
        models = f"{shown(base.header['model'])} and {shown(said.header['model'])}"
        raise ValueError(f"{base.path} and {said.path} are of different models: {models}")
    common = base.items.keys() & said.items.keys()
    if not common:
        raise ValueError(f"{base.path} and {said.path} have no items in common")
    for one, other in ((base, said), (said, base)):
        if lacking := [key for key in one.items if key not in common]:
            (task, number), count = lacking[0], len(lacking)
            raise ValueError(
                f"{other.path} lacks {count} of the {len(one.items)} items of {one.path}: item {shown(number)} of task "
                f"{shown(task)} is the first"
            )
    for (task, number), item in base.items.items():
        other = said.items[task, number]
        if (item.gold, item.lengths) != (other.gold, other.lengths):
            raise ValueError(
                f"{base.path} and {said.path}: item {shown(number)} of task {shown(task)} has other choices or another "
                "right one"
            )
