# SPDX-License-Identifier: Apache-2.0
"""The sections of a page, in their order: what was measured, in tables and figures."""

from collections.abc import Sequence
from pathlib import Path

from ..bench.plot import draw_times
from ..files import digest
from ..quality.paired import together
from ..quality.plot import draw_places
from ..quality.relation import next_tokens, relate
from ..search.plot import COSTS, KINDS
from ..search.plot import draw as draw_frontier
from . import quality
from .cells import drawn, megabytes, said, spread
from .document import Code, Section, Table, Text
from .sources import Inputs, Rows, Sensitivity

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
TIMES = ("setting", "TP", "link", "ms, median", "20 to 80 %", "times as fast (95 % interval)", "MB received per rank")
MOST_TIMES = 3  # columns of times in the first table


def sections(inputs: Inputs, compared: list[dict], command: str, missing: Sequence[str]) -> list[Section]:
    """compared: rows of `compare`. command: that makes the page again. missing: what was not given, for the reader."""
    made = [_about(inputs), _glance(inputs, compared)]
    made += [quality.text(rows, first=rows is inputs.evaluate[0]) for rows in inputs.evaluate]
    if compared:
        made.append(quality.tasks(compared))
    texts = {rows.path: rows.rows for rows in inputs.evaluate}
    made.append(quality.relation(relate(texts, compared), next_tokens(texts)))
    if inputs.sensitivity:
        made.append(_places(inputs.sensitivity))
    if inputs.search:
        made.append(_frontier(inputs.search))
    made += [_ttft(rows, number) for number, rows in enumerate(inputs.ttft, 1)]
    if inputs.policies:
        parts = [part for name, text in inputs.policies for part in (Text(name), Code(text))]
        made.append(Section("Policies" if len(inputs.policies) > 1 else "Policy", parts))
    made.append(_again(inputs, command, missing))
    return [section for section in made if section.parts]


def _about(inputs: Inputs) -> Section:
    configs = [rows.config for rows in (*inputs.evaluate, *inputs.ttft) if rows.config]
    headers = [run.header for run in inputs.items]
    timed = [row for rows in inputs.ttft for row in rows.rows]
    facts = {
        "model": [Path(str(found["model"])).name for found in (*configs, *headers) if found.get("model")],
        "tensor-parallel ranks": [found["tp"] for found in (*configs, *headers, *timed) if found.get("tp")],
        "dtype": [_dtype(found["dtype"]) for found in (*headers, *configs, *timed) if found.get("dtype")],
        "texts": [rows.scored for rows in inputs.evaluate],
        "tasks": [task for run in inputs.items[:1] for task in run.tasks],
        "links": [row["link"] for row in timed],
        "device of the times": [row["device"] for row in timed],
        "dates of the times": [row["date"] for row in timed],
        "versions": [f"{name} {version}" for found in _versions(inputs) for name, version in found.items()],
    }
    rows = [(name, ", ".join(dict.fromkeys(map(str, found)))) for name, found in facts.items() if found]
    return Section("What was measured", [Table(("", ""), rows)] if rows else [])


def _dtype(name: object) -> str:
    return DTYPES.get(str(name), str(name))


def _versions(inputs: Inputs) -> list[dict]:
    found = [rows.versions for rows in (*inputs.evaluate, *inputs.ttft, *filter(None, [inputs.search]))]
    return found + [dict(run.header["versions"]) for run in inputs.items if isinstance(run.header["versions"], dict)]


def _glance(inputs: Inputs, compared: list[dict]) -> Section:
    """A row for each setting, of everything that was measured of it."""
    columns: dict[str, dict[str, str]] = {}
    for rows in inputs.evaluate[:1]:  # others have sections of their own
        columns["algorithm"] = {row["codec"]: row["algorithm"] for row in rows.rows}
        columns["bits per value"] = {row["codec"]: said(row, "bits_per_value", ".2f") for row in rows.rows}
        columns["MB received per rank"] = {row["codec"]: megabytes(row) for row in rows.rows}
        columns["perplexity"] = {r["codec"]: said(r, "perplexity_increase_pct", "+.2f", " %") for r in rows.rows}
        columns["KL"] = {row["codec"]: said(row, "kl", ".4f") for row in rows.rows}
    rows = together(compared, "acc")
    columns["answers that flip"] = {row["setting"]: f"{100 * row['flips']:.1f} %" for row in rows}
    columns["accuracy, points"] = {row["setting"]: f"{100 * row['accuracy_change']:+.1f}" for row in rows}
    columns |= _times([row for rows in inputs.ttft for row in rows.rows])
    columns = {heading: cells for heading, cells in columns.items() if cells}
    settings = list(dict.fromkeys(name for cells in columns.values() for name in cells))
    rows = [[name, *(cells.get(name, "") for cells in columns.values())] for name in settings]
    numbers = [place for place, heading in enumerate(columns, 1) if heading != "algorithm"]
    return Section("At a glance", [Table(("setting", *columns), rows, numbers)] if rows else [])


def _times(rows: list[dict]) -> dict[str, dict[str, str]]:
    """A column for each number of ranks and link, unless there are too many."""
    columns: dict[str, dict[str, str]] = {}
    for row in rows:
        of_link = columns.setdefault(f"first token, TP={row['tp']}, {row['link']}", {})
        of_link[row["policy"]] = f"{row['ttft_ms']:,.0f} ms\n({row['speedup_vs_none']:.2f}x)"
    return columns if len(columns) <= MOST_TIMES else {}


def _places(found: Sensitivity) -> Section:
    what = "the dropped sum" if found.codec == "drop" else f"the rounding error of {found.codec}"
    title = f"KL that {what} costs, by layer and site"
    worst = sorted(found.kl.items(), key=lambda place: -place[1])[:5]
    total = sum(found.kl.values())
    rows = [(str(layer), site, f"{kl:.4g}", f"{100 * kl / total:.0f} %") for (layer, site), kl in worst]
    return Section(
        "Where it comes from",
        [
            drawn("places", title, lambda path: draw_places(found.kl, title, path)),
            Table(("layer", "site", "KL, nats per token", "of the sum over all"), rows, (2, 3)),
        ],
    )


def _frontier(found: Rows) -> Section:
    rows = [row for row in found.rows if row["kl"] and row["kind"] in KINDS]
    if not rows:
        return Section("Search", [])
    # A search with drops has its policies' predicted times: bits per value leave out what is not sent at all.
    cost = "sums_ms" if all(isinstance(row.get("sums_ms"), (int, float)) for row in rows) else "bits_per_value"
    rows.sort(key=lambda row: (row[cost], row["kl"]))
    best = [row for row in rows if row["chosen"] or not any(_beats(other, row, cost) for other in rows)]
    bound = found.config.get("max_kl")
    bound = bound if isinstance(bound, (int, float)) else None
    figure = drawn("frontier", "Cost and KL", lambda path: draw_frontier(rows, {}, bound, found.name, path, cost))
    about = Text("Points that no other point beats in both, and what was written:")
    headings = ("policy", "algorithm", COSTS[cost], "KL, nats per token", "perplexity, %", "")
    return Section("Search", [figure, about, Table(headings, [_point(row, cost) for row in best], (2, 3, 4))])


def _beats(one: dict, other: dict, cost: str) -> bool:
    return (
        one[cost] <= other[cost] and one["kl"] <= other["kl"] and (one[cost], one["kl"]) != (other[cost], other["kl"])
    )


def _point(row: dict, cost: str) -> list[str]:
    cells = [row["name"], row["algorithm"], f"{row[cost]:.5g}", f"{row['kl']:.4f}"]
    return [*cells, said(row, "perplexity_increase_pct", "+.2f"), row["chosen"]]


def _ttft(found: Rows, number: int) -> Section:
    rows = found.rows
    what = f"Time to first token, {rows[0]['prompt_tokens']} tokens, {_dtype(rows[0]['dtype'])}"
    draw = {
        "panel": lambda row: f"TP={row['tp']}, {row['link']}",
        "bar": lambda row: row["policy"],
        "time": "ttft_ms",
        "speedup": "speedup_vs_none",
    }
    figure = drawn(f"ttft{number}", what, lambda path: draw_times(rows, path, what, **draw))
    return Section("Time to first token", [figure, Table(TIMES, [_time(row) for row in rows], (1, 3, 4, 5, 6))])


def _time(row: dict) -> list[str]:
    ends = {f"fast_{end}": row.get(f"speedup_{end}") for end in ("low", "high")}
    times = [f"{row['ttft_ms']:,.0f}", f"{row['p20_ms']:,.0f} to {row['p80_ms']:,.0f}"]
    fast = spread({"fast": row["speedup_vs_none"], **ends}, "fast", ".2f")
    return [row["policy"], str(row["tp"]), row["link"], *times, fast, megabytes(row)]


def _again(inputs: Inputs, command: str, missing: Sequence[str]) -> Section:
    parts: list = [Text("This page:"), Code(command)]
    paths = [run.path for run in inputs.items] + [rows.path for rows in (*inputs.evaluate, *inputs.ttft)]
    paths += [found.path for found in (inputs.search, inputs.sensitivity) if found]
    of_rows = (*inputs.evaluate, *inputs.ttft, *filter(None, [inputs.search]))
    commands = [rows.command for rows in of_rows] + [run.header["command"] for run in inputs.items]
    if commands := list(dict.fromkeys(filter(None, commands))):
        parts += [Text("What it shows was measured by:"), Code("\n".join(commands))]
    files = [(Path(path).name, digest(path)) for path in dict.fromkeys(paths)]
    parts.append(Table(("file", "sha256, first digits"), files))
    if missing:
        parts.append(Text(f"Not given, and so not on this page: {', '.join(missing)}."))
    return Section("How to make it again", parts)
