# SPDX-License-Identifier: Apache-2.0
"""The page of `megatron-comp report`: what it shows, what it says is missing, and that files cannot run code in it."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from items import drawn_items, item, write_items

from megatron_comp import cli

pytest.importorskip("matplotlib")
RESULTS = Path(__file__).resolve().parents[2] / "examples" / "results"
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> $\\bad$ --> ]]> *a*|`b`"
VOID = ("meta", "br")


class Parsed(HTMLParser):
    """A page's tags, attributes and texts; raises AssertionError if tags do not match."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def evaluate_row(codec, kl):
    ends = {"kl_low": None if kl is None else 0.9 * kl, "kl_high": None if kl is None else 1.1 * kl}
    return {
        **{"codec": codec, "algorithm": "gather_sum", "bits_per_value": 4.5, "perplexity": 20.0},
        **{"perplexity_increase_pct": 3.5, "kl": kl, **ends, "top1_agreement": 0.9, "bytes_per_rank": 238_878_720},
    }


@pytest.fixture
def report(tmp_path, monkeypatch):
    """report(*args) -> status of `megatron-comp report args`, in this process and in a folder of its own."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)
    return lambda *args: cli.main(["report", *map(str, args)])


@pytest.fixture
def inputs(tmp_path):
    """Of every kind one, with hostile names; as options."""
    noise = {"none": 0.0, "int8": 0.1, "policies/mine.yaml": 0.5, HOSTILE: 1.0}
    rows = [evaluate_row(codec, 0.1 * sigma**2) for codec, sigma in noise.items()]
    config = {"model": f"models/{HOSTILE}", "tp": 2, "text": "prose.txt", "tokens": 512, "context": 64}
    content = {"command": f"evaluate {HOSTILE}", "config": config, "versions": {"torch": HOSTILE}, "rows": rows}
    (tmp_path / "text.json").write_text(json.dumps(content))
    names = ["text.json"]
    for place, (setting, sigma) in enumerate(noise.items()):
        write_items(tmp_path / f"{place}.jsonl", setting, drawn_items(sigma, ("a", HOSTILE), 40))
    with (RESULTS / "2026-11-21_ttft_smollm2.csv").open() as file:
        times = list(csv.DictReader(file))[:2]
    times[1]["policy"] = times[1]["link"] = HOSTILE
    with (tmp_path / "times.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, times[0])
        writer.writeheader()
        writer.writerows(times)
    (tmp_path / "policy.yaml").write_text(f"# {HOSTILE}</pre>\ncodec: mxfp4\n")
    settings = {"context": 65, "candidates": ["int8:32:fp16", HOSTILE]}
    places = [
        {"layer": layer, "site": site, "values": 100, "nbytes": [106, 56], "damage": [[0.1, 6.4 * (layer + 1)], [0, 0]]}
        for layer in (0, 1)
        for site in ("attention", "mlp")
    ]
    state = {"settings": settings, "sensitivity": {"windows": 2, "rows": places}}
    (tmp_path / "search.state").write_text(json.dumps(state))
    options = [f"--evaluate={name}" for name in names] + [f"--items={place}.jsonl" for place in range(len(noise))]
    options += ["--ttft=times.csv", f"--search={RESULTS / '2026-11-21_search_smollm2_tp3.csv'}"]
    return [*options, "--sensitivity=search.state", "--policy=policy.yaml", "--title", HOSTILE]


def test_a_page_of_everything_shows_it_and_runs_nothing(report, inputs, tmp_path, capsys):
    assert report("--out=page.html", *inputs, "--json=rows.json", "--csv=rows.csv") == 0
    assert capsys.readouterr().out.endswith("report: wrote page.html\n")
    page = (tmp_path / "page.html").read_text()
    parsed = Parsed(page)
    assert not {"script", "img", "iframe", "a", "link", "object", "image", "foreignobject"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert all(value.startswith("#") for name, value in parsed.attributes if name in ("href", "xlink:href", "src"))
    assert "default-src 'none'" in page and "mathdefault" not in page
    text = "\n".join(parsed.texts)
    assert text.count(HOSTILE) >= 10 and parsed.tags.count("svg") == 5
    titles = ["What was measured", "At a glance", "Text: prose.txt (8 windows of 64 tokens)", "Tasks"]
    titles += ["Which KL is harmless", "Where it comes from", "Search", "Time to first token", "Policy"]
    found = re.findall(r"<h2>(.*?)</h2>", page)
    assert found == [*titles, "How to make it again"]
    assert "0.0250" in text and "(0.0225 to 0.0275)" in text  # KL of mine.yaml
    assert "mine.yaml" in text and "policies/mine.yaml" not in text
    assert "0.05" in text.partition("Where it comes from")[2]  # 6.4 nats in 128 tokens
    assert "Not given" not in text and "megatron-comp " in text
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows) == 3 * 3 * 2 == len(list(csv.DictReader((tmp_path / "rows.csv").open())))
    # Every flip and interval of the rows is on the page.
    for row in rows:
        if row["task"] == "all tasks":
            assert f"{100 * row['flips']:.1f}" in text
            assert f"({100 * row['flips_low']:.1f} to {100 * row['flips_high']:.1f})" in text


def test_markdown_has_its_figures_beside_it(report, inputs, tmp_path):
    assert report("--out=page.md", *inputs) == 0
    page = (tmp_path / "page.md").read_text()
    figures = re.findall(r"\]\(<(\S+)>\)", page)
    assert len(figures) == 5 and all((tmp_path / name).read_text().startswith("<?xml") for name in figures)
    outside = re.sub(r"^(`{3,})\n.*?^\1$", "", page, flags=re.M | re.S)
    assert "<script" not in outside and "<img" not in outside and "&lt;script&gt;alert(1)" in outside
    tables = re.findall(r"^\|.*\|$", outside, re.M)
    columns = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    rules = [place for place, line in enumerate(tables) if set(line) <= set("|-: ")]
    assert len(rules) > 8
    for rule in rules:  # as many cells in each line of a table
        assert columns[rule - 1] == columns[rule] == columns[rule + 1]


def test_what_is_not_given_is_said(report, tmp_path, capsys):
    (tmp_path / "text.json").write_text(json.dumps({"rows": [evaluate_row("none", 0.0), evaluate_row("ruined", None)]}))
    assert report("--out=page.html", "--evaluate=text.json") == 0
    lacks = "tasks (--items), times to first token (--ttft), the frontier of a search (--search), "
    lacks += "KL by layer and site (--sensitivity), policy files (--policy)"
    assert capsys.readouterr().out == f"report: wrote page.html; not on it: {lacks}\n"
    text = "\n".join(Parsed((tmp_path / "page.html").read_text()).texts)
    assert f"Not given, and so not on this page: {lacks}." in text and "not finite" in text


def test_sensitivity_may_be_of_dropped_sums(report, tmp_path):
    source = RESULTS / "2026-11-21_drop_sensitivity_smollm2_tp3.csv"
    assert report("--out=page.html", f"--sensitivity={source}") == 0
    assert "KL that the dropped sum costs, by layer and site" in (tmp_path / "page.html").read_text()


def test_a_search_with_drops_is_shown_by_time(report, tmp_path):
    """Bits per value leave out what a policy does not send at all. The written one stays, beaten or not."""
    assert report("--out=page.md", f"--search={RESULTS / '2026-11-21_search_drop_smollm2_tp2.csv'}") == 0
    page = (tmp_path / "page.md").read_text()
    table = page.partition("predicted time of all sums of a prompt, ms | KL")[2]
    assert table.count("&lt;- written") == 1
    with (RESULTS / "2026-11-21_search_drop_smollm2_tp2.csv").open() as file:
        rows = [(float(row["sums_ms"]), float(row["kl"])) for row in csv.DictReader(file) if float(row["kl"]) > 0]
    cheapest = min(rows)
    assert f"| {cheapest[0]:.5g} | {cheapest[1]:.4f} |" in table


@pytest.mark.parametrize(
    "options, said",
    [
        ([], "nothing to report: give at least one of --evaluate, --items"),
        (["--evaluate=nowhere.json"], "nowhere.json"),
        (["--evaluate=other.json"], "other.json has no rows"),
        (["--evaluate=words.csv"], "words.csv, row 1 is not one of `megatron-comp evaluate --text`: it lacks codec"),
        (["--ttft=words.csv"], "words.csv, row 1 is not one of `megatron-comp bench ttft`: it lacks policy"),
        (["--search=image.png"], "image.png is neither JSON nor CSV"),
        (["--sensitivity=broken.state"], "broken.state is not a state of `megatron-comp search`"),
        (["--items=none.jsonl", "--items=none.jsonl"], "exactly one file is to be of the setting none"),
        (["--items=int4.jsonl"], "exactly one file is to be of the setting none; these are of int4"),
        (["--items=none.jsonl", "--items=int4.jsonl"], "int4.jsonl lacks 1 of the 2 items of none.jsonl"),
        (["--policy=words.csv"], "words.csv"),
        (["--evaluate=text.json", "--out=nowhere/page.html"], "--out nowhere/page.html: not a file"),
    ],
)
def test_bad_input(report, error_line, tmp_path, options, said):
    """One line, and no page."""
    (tmp_path / "other.json").write_text('{"config": {}}')
    (tmp_path / "text.json").write_text(json.dumps({"rows": [evaluate_row("none", 0.0)]}))
    (tmp_path / "words.csv").write_text("a,b\n1,2\n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    (tmp_path / "broken.state").write_text('{"settings": {}, "sensitivity": {"windows": 0}}')
    items = [item("a", number, [0.0, 1.0]) for number in (0, 1)]
    write_items(tmp_path / "none.jsonl", "none", items)
    write_items(tmp_path / "int4.jsonl", "int4", items[:1])
    assert report("--out=page.html", *options) == 2
    assert said in error_line() and not (tmp_path / "page.html").exists()
