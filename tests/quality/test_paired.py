# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
from items import HEADER, drawn_items, item, write_items
from scipy import stats

from megatron_comp.quality.bootstrap import RESAMPLES, intervals, means
from megatron_comp.quality.items import read_items
from megatron_comp.quality.paired import ALL, compare, mcnemar


def by_hand(*best):
    """Two choices, gold 0; an item's first choice leads the second by so many nats."""
    return [item("a", number, [-5.0 + lead, -5.0], lengths=[10, 10]) for number, lead in enumerate(best)]


def test_what_a_person_can_count(tmp_path):
    """Five items: one turns wrong, two turn right, two stay; leads move by -2, +2, +2, 0 and +3."""
    base = read_items(write_items(tmp_path / "none", "none", by_hand(1.0, -1.0, -1.0, 1.0, -4.0)))
    said = read_items(write_items(tmp_path / "int4", "int4", by_hand(-1.0, 1.0, 1.0, 1.0, -1.0)))
    acc, acc_norm = compare(base, said)
    assert (acc["setting"], acc["task"], acc["score"], acc["items"]) == ("int4", "a", "acc", 5)
    assert (acc["accuracy_none"], acc["accuracy"]) == (2 / 5, 3 / 5)
    assert acc["accuracy_change"] == pytest.approx(0.2) and acc["flips"] == 3 / 5
    assert (acc["to_wrong"], acc["to_right"], acc["mcnemar_p"]) == (1, 2, 1.0)
    assert acc["margin_change"] == 1.0 and acc_norm["margin_change"] == pytest.approx(0.1)
    assert acc["accuracy_change_low"] < 0 < acc["accuracy_change_high"]


def test_lengths_decide_the_normalised_answer_and_the_first_of_equals_wins(tmp_path):
    items = [item("a", 0, [-6.0, -5.0], gold=0, lengths=[12, 5]), item("a", 1, [-1.0, -1.0, -1.0], gold=0)]
    run = read_items(write_items(tmp_path / "none", "none", items))
    long, equal = run.items.values()
    assert (long.right(), long.right(per_character=True)) == (False, True)  # -0.5 against -1 per character
    assert (long.margin(), long.margin(per_character=True)) == (-1.0, 0.5)
    assert equal.right() and equal.margin() == 0


def test_equal_answers_differ_by_nothing(tmp_path):
    base = read_items(write_items(tmp_path / "none", "none", drawn_items(0)))
    for row in compare(base, base):
        assert row["accuracy_change"] == row["flips"] == row["margin_change"] == 0 and row["mcnemar_p"] == 1
        # As likely as 2.5 % is no flip in n items of which so many flip.
        assert row["flips_low"] == 0 and (1 - row["flips_high"]) ** row["items"] == pytest.approx(0.025)


def test_tasks_are_compared_alone_and_together(tmp_path):
    base = read_items(write_items(tmp_path / "none", "none", drawn_items(0)))
    said = read_items(write_items(tmp_path / "int4", "int4", drawn_items(0.5)))
    rows = [row for row in compare(base, said) if row["score"] == "acc"]
    a, b, both = rows
    assert [row["task"] for row in rows] == ["a", "b", ALL] and both["items"] == 400
    assert both["to_wrong"] == a["to_wrong"] + b["to_wrong"] > 0
    assert both["accuracy"] == pytest.approx((a["accuracy"] + b["accuracy"]) / 2)
    assert both["flips_high"] - both["flips_low"] < a["flips_high"] - a["flips_low"]


def test_intervals_are_those_of_scipy_and_of_the_normal_distribution():
    """scipy's own paired bootstrap of the difference of two means; and a standard error's 1.96."""
    x, y = np.random.default_rng(3).random((2, 400)).round()
    (low,), (high,) = intervals(means((y - x)[None]), 400, 1)
    theirs = stats.bootstrap(
        (y, x),
        lambda y, x, axis: y.mean(axis) - x.mean(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(7),
    ).confidence_interval
    error = (y - x).std() / 20
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.3 * error)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_one_item_has_no_interval(tmp_path):
    run = read_items(write_items(tmp_path / "none", "none", by_hand(1.0)))
    assert compare(run, run)[0]["margin_change_low"] is None


@pytest.mark.parametrize("to_wrong, to_right, p", [(0, 0, 1), (0, 5, 2 / 32), (5, 0, 2 / 32), (2, 8, 112 / 1024)])
def test_mcnemar(to_wrong, to_right, p):
    """Closed forms: 10 flips split 2 to 8 or worse with probability 2 (1 + 10 + 45) / 2^10."""
    assert mcnemar(to_wrong, to_right) == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize(
    "items, header, said",
    [
        (by_hand(1.0, 1.0), {}, "int4 lacks 1 of the 3 items of .*none: item 2 of task 'a' is the first"),
        (by_hand(*[1.0] * 4), {}, "none lacks 1 of the 4 items of .*int4: item 3"),
        ([item("b", 0, [0.0, 1.0])], {}, "have no items in common"),
        ([item("a", 0, [0.0, 1.0], gold=1), *by_hand(1.0, 1.0, 1.0)[1:]], {}, "item 0 of task 'a' has other choices"),
        (by_hand(1.0, 1.0, 1.0), {"model": "another"}, "different models: 'a-model' and 'another'"),
    ],
)
def test_runs_that_cannot_be_compared_are_named(tmp_path, items, header, said):
    base = read_items(write_items(tmp_path / "none", "none", by_hand(1.0, 1.0, 1.0)))
    other = read_items(write_items(tmp_path / "int4", "int4", items, **header))
    with pytest.raises(ValueError, match=said):
        compare(base, other)


@pytest.mark.parametrize(
    "line, said",
    [
        (item("a", 1, [float("nan"), 0.0]), r"line 3: task 'a', item 1: log-probabilities \[nan, 0.0\] are not finite"),
        (item("a", 1, [0.0, -float("inf")]), "are not finite"),
        (item("a", 1, [0.0]), "at least two log-probabilities"),
        (item("a", 1, [0.0, "x"]), "at least two log-probabilities"),
        (item("a", 1, [0.0, 1.0], lengths=[3]), "expected 2 numbers of characters"),
        (item("a", 1, [0.0, 1.0], lengths=[3, 0]), "expected 2 numbers of characters"),
        (item("a", 1, [0.0, 1.0], gold=2), "gold 2 is not the number of a choice: there are 2"),
        (item("a", 0, [0.0, 1.0]), "task a has item 0 twice"),
        (item(None, 0, [0.0, 1.0]), "expected a name"),
        ([1], "not a JSON object"),
    ],
)
def test_a_line_that_is_no_item_is_named(tmp_path, line, said):
    with pytest.raises(ValueError, match=said):
        read_items(write_items(tmp_path / "none", "none", [*by_hand(1.0), line]))


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "holds no items"),
        ("{", "line 1: Expecting"),
        (json.dumps({"rows": []}), 'line 1: the first line of an items file has "kind": "items"'),
        (json.dumps({"kind": "items", "model": "x"}), "line 1: the header lacks policy, setting"),
        (json.dumps(HEADER), "holds no items"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, content, said):
    (tmp_path / "file").write_text(content)
    with pytest.raises(ValueError, match=said):
        read_items(tmp_path / "file")
