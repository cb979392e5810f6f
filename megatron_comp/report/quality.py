# SPDX-License-Identifier: Apache-2.0
"""Sections of a page on quality: texts, tasks, and which KL is harmless."""

from ..quality.paired import ALL, SCORES, together
from ..quality.plot import draw_flips, draw_relation
from ..quality.relation import FLIPS, Fit, fit
from .cells import drawn, percent, said, spread
from .document import Code, Figure, Section, Table, Text
from .sources import Rows

ABOUT_TEXTS = (
    "KL is the divergence from the uncompressed model's predictions, in nats per token; its quantiles are over tokens. "
    "Top-1: share of tokens whose most likely next token stays the same."
)
ABOUT_INTERVALS = (
    " RMS Δp: root of the mean square change of the true token's probability. In brackets: 95 % intervals, by a "
    "bootstrap over windows of text."
)
ABOUT_TASKS = (
    "Multiple choice. acc: the answer is the choice with the highest summed log-probability; acc_norm: the highest per "
    "character. Every setting answers the same items as the uncompressed model, so the statistics are paired. In "
    "brackets: 95 % intervals, of changes by a bootstrap over items, of flips exact. p is McNemar's exact test of "
    "whether as many answers turn right as turn wrong; of many p values, one in twenty is below 0.05 by chance. The "
    "lead is the log-probability of the right choice less that of the best other one."
)
ABOUT_RELATION = (
    "KL is far less noisy than accuracy: a few thousand tokens fix it to within about a tenth, while a change of "
    "accuracy by half a point takes thousands of items to be seen. So a bound is set on KL, and this is what a KL goes "
    "with. An answer flips if it turns wrong or right, a next token if the most likely one is another."
)
TEXT_COLUMNS = {
    "perplexity": ("perplexity", ".2f"),
    "perplexity_increase_pct": ("change, %", "+.2f"),
    "kl": ("KL, mean", ".4f"),
    "kl_median": ("median", ".4f"),
    "kl_p95": ("95 %", ".3f"),
    "kl_p99": ("99 %", ".3f"),
    "top1_agreement": ("top-1", ".3f"),
    "rms_probability_change": ("RMS Δp", ".4f"),
}
TASK_COLUMNS = ("uncompressed, %", "%", "change, points", "turned wrong", "turned right", "flips, %", "p", "lead, nats")


def text(rows: Rows, first: bool) -> Section:
    """Figures of one text; of the first, also what they are."""
    columns = {key: column for key, column in TEXT_COLUMNS.items() if key in rows.rows[0]}
    table = [[row["codec"], *(spread(row, key, spec) for key, (_, spec) in columns.items())] for row in rows.rows]
    headings = ("setting", *(heading for heading, _ in columns.values()))
    about = ABOUT_TEXTS + (ABOUT_INTERVALS if "rms_probability_change" in columns else "")
    parts = [Text(about)] if first else []
    return Section(f"Text: {rows.scored}", [*parts, Table(headings, table, range(1, len(headings)))])


def tasks(compared: list[dict]) -> Section:
    """Accuracy, flips and margins; compared: rows of `paired.compare`."""
    named = [task for task in dict.fromkeys(row["task"] for row in compared) if task != ALL]
    rows = together(compared, "acc")
    items = f"{rows[0]['items']:,} items of {len(named)} task{'s' * (len(named) > 1)}"
    title = f"Answers that flip under each setting: acc, {items}"
    parts: list[Text | Code | Table | Figure] = [Text(ABOUT_TASKS)]
    parts.append(drawn("flips", title, lambda path: draw_flips(rows, title, path)))
    for score in SCORES:
        headings = [f"{score}, {items}", *TASK_COLUMNS]
        if score == "acc_norm":
            headings[-1] += " per character"
        table = [_of_task(row) for row in together(compared, score)]
        parts.append(Table(headings, table, range(1, len(headings))))
    if len(named) > 1:
        parts.append(Text("Change of acc by task, in points; * where p is below 0.05:"))
        cells = {(row["setting"], row["task"]): _change(row) for row in compared if row["score"] == "acc"}
        settings = dict.fromkeys(row["setting"] for row in compared)
        table = [[setting, *(cells[setting, task] for task in named)] for setting in settings]
        parts.append(Table(("setting", *named), table, range(1, len(named) + 1)))
    return Section("Tasks", parts)


def _of_task(row: dict) -> list[str]:
    return [
        *(row["setting"], f"{100 * row['accuracy_none']:.1f}", f"{100 * row['accuracy']:.1f}"),
        *(percent(row, "accuracy_change", "+.1f"), str(row["to_wrong"]), str(row["to_right"])),
        *(percent(row, "flips", ".1f"), f"{row['mcnemar_p']:.2g}"),
        spread(row, "margin_change", "+.4f" if row["score"] == "acc_norm" else "+.3f"),
    ]


def _change(row: dict) -> str:
    star = " *" if row["mcnemar_p"] < 0.05 else ""
    return percent(row, "accuracy_change", "+.1f").replace("\n", f"{star}\n")


def relation(answers: list[dict], tokens: list[dict]) -> Section:
    """answers, tokens: rows of `relation.relate` and of `relation.next_tokens`."""
    lines = {"answers": fit(answers), "next tokens": fit(tokens)}
    if not any(lines.values()):
        return Section("", [])
    says = "Answers and next tokens that flip, by KL on text"
    parts: list[Text | Code | Table | Figure] = [Text(ABOUT_RELATION)]
    parts.append(drawn("relation", says, lambda path: draw_relation(answers, tokens, list(lines.values()), path)))
    headings = ("setting", "bits per value", "KL", "perplexity, %", "flips, %", "accuracy, points", "p")
    rows = []
    for row in answers:
        cells = [row["setting"], f"{row['bits_per_value']:.2f}", f"{row['kl']:.4f}"]
        cells += [said(row, "perplexity_increase_pct", "+.2f"), percent(row, "flips", ".1f")]
        rows.append([*cells, percent(row, "accuracy_change", "+.1f"), f"{row['mcnemar_p']:.2g}"])
    if rows:
        parts.append(Table(headings, rows, range(1, len(headings))))
    lines = {what: line for what, line in lines.items() if line}
    parts += [Text(f"Share of {what} that flip: {_formula(line)}.") for what, line in lines.items()]
    parts.append(Text("Read the other way round, as a bound for search --max-kl, in nats per token:"))
    bounds = [[f"{100 * flips:g} %", *(f"{line.kl(flips):.2g}" for line in lines.values())] for flips in FLIPS]
    headings = ("that may flip", *(f"KL, by {what}" for what in lines))
    parts.append(Table(headings, bounds, range(len(headings))))
    return Section("Which KL is harmless", parts)


def _formula(line: Fit) -> str:
    fitted = f"{100 * line.scale:.3g} % x KL^{line.exponent:.2f}"
    return f"{fitted} (exponent ± {line.exponent_error:.2f}, fitted to {line.points} points)"
