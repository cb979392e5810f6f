# SPDX-License-Identifier: Apache-2.0
import pytest

from megatron_comp.quality.paired import ALL
from megatron_comp.quality.relation import fit, next_tokens, relate


def text(**kls):
    return [
        {"codec": codec, "bits_per_value": 4.5, "kl": kl, "perplexity_increase_pct": 1.0} for codec, kl in kls.items()
    ]


def task(setting, flips, name=ALL, score="acc"):
    return {"setting": setting, "task": name, "score": score, "flips": flips, "accuracy_change": -0.01}


def test_settings_are_joined_and_texts_averaged():
    texts = {"one": text(a=0.3, b=0.1, c=0.2, none=0.0), "two": text(a=0.5, b=0.1)}
    tasks = [task("a", 0.2), task("b", 0.1), task("c", 0.1), task("b", 0.9, "alone"), task("b", 0.8, score="acc_norm")]
    rows = relate(texts, tasks)
    assert [(row["setting"], row["flips"]) for row in rows] == [("b", 0.1), ("a", 0.2)]  # c lacks a text
    assert rows[1]["kl"] == pytest.approx(0.4)
    assert [row["setting"] for row in relate(texts, tasks, "acc_norm")] == ["b"]
    assert relate({}, tasks) == [] and relate(texts, []) == []


def test_a_ruined_setting_is_left_out():
    assert relate({"one": text(a=None, b=0.1)}, [task("a", 0.5), task("b", 0.1)])[0]["setting"] == "b"


def test_the_line_is_found_and_read_both_ways():
    """flips = 30 % of the root of KL: 3 % at 0.01 nats, and 0.01 nats at 3 %."""
    rows = [{"kl": kl, "flips": 0.3 * kl**0.5, "items": 500} for kl in (0.001, 0.004, 0.05, 0.2)]
    line = fit([*rows, {"kl": 0.0, "flips": 0.0, "items": 500}])
    assert (line.scale, line.exponent, line.points) == (pytest.approx(0.3), pytest.approx(0.5), 4)
    assert line.exponent_error == pytest.approx(0, abs=1e-7)
    assert line.flips(0.01) == pytest.approx(0.03) and line.kl(0.03) == pytest.approx(0.01)


def test_next_tokens_are_those_of_all_texts():
    rows = [{"codec": "a", "kl": 0.1, "top1_agreement": 0.75}, {"codec": "ruined", "kl": None, "top1_agreement": None}]
    assert [(row["setting"], row["kl"], row["flips"]) for row in next_tokens({"one": rows, "two": rows[:1]})] == [
        ("a", 0.1, 0.25)
    ] * 2


def test_few_flips_weigh_little():
    """A hundred times as many flips hold the line where they are."""
    points = [(0.01, 0.03, 10_000), (0.04, 0.06, 10_000), (0.001, 0.1, 10)]
    line = fit([dict(zip(("kl", "flips", "items"), point)) for point in points])
    assert line.flips(0.02) == pytest.approx(0.3 * 0.02**0.5, rel=0.02) and line.exponent_error > 0.01


@pytest.mark.parametrize(
    "points", [[], [(0.1, 0.1), (0.2, 0.2)], [(0.1, 0.1)] * 3, [(0.1, 0.3), (0.2, 0.2), (0.3, 0.1)]]
)
def test_too_few_settings_or_none_that_agree_give_no_line(points):
    assert fit([{"kl": kl, "flips": flips, "items": 500} for kl, flips in points]) is None
