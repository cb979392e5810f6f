# SPDX-License-Identifier: Apache-2.0
"""Figures of what compression costs: answers that flip, the KL that goes with it, and where in the model KL begins."""

from collections.abc import Mapping, Sequence

from ..launcher.figure import label_plainly, save
from .relation import Fit

WRONG, RIGHT, PLAIN = "#d55e00", "#0072b2", "#4d5761"  # told apart by the colour-blind, and in print


def draw_flips(rows: Sequence[dict], title: str, path: str) -> None:
    """For each setting, the share of answers that turned wrong to the right of the axis, that turned right to the left.

    rows: of `paired.compare`, one per setting.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.5 + 0.36 * len(rows)), layout="constrained")
    axes = figure.add_subplot(title=title)
    places = range(len(rows))
    wrong, right = ([100 * row[key] / row["items"] for row in rows] for key in ("to_wrong", "to_right"))
    axes.barh(places, wrong, 0.62, color=WRONG, label="turned wrong")
    axes.barh(places, [-share for share in right], 0.62, color=RIGHT, label="turned right")
    most = max([*wrong, *right]) or 1
    for place, row in zip(places, rows):
        said = f"{row['to_wrong']} wrong, {row['to_right']} right; p = {row['mcnemar_p']:.2g}"
        axes.annotate(said, (wrong[place], place), (6, 0), textcoords="offset points", va="center", fontsize="small")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, [row["setting"] for row in rows])
    axes.set(xlim=(-1.25 * most, 2.1 * most), xlabel="share of all items, % (right of the axis: it turned wrong)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.invert_yaxis()
    figure.legend(loc="outside lower right", ncols=2, fontsize="small", frameon=False)
    save(figure, path)


def draw_relation(answers: Sequence[dict], tokens: Sequence[dict], lines: Sequence[Fit | None], path: str) -> None:
    """Flips over KL: answers of tasks, each with its interval and its setting's name, and next tokens of texts.

    answers, tokens: of `relation.relate` and `relation.next_tokens`. lines: fitted to each of them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.add_subplot(title="What flips, by KL on text; whiskers: 95 % interval")
    kinds = ((answers, "answers", RIGHT, "o"), (tokens, "next tokens", WRONG, "s"))
    for (rows, what, color, marker), line in zip(kinds, lines):
        rows = [row for row in rows if row["kl"] > 0 and row["flips"] > 0]
        for row in rows:
            ends = [100 * row.get(f"flips_{end}", row["flips"]) for end in ("low", "high")]
            axes.plot([row["kl"]] * 2, ends, color="#9aa5b1", zorder=1)
        points = [row["kl"] for row in rows], [100 * row["flips"] for row in rows]
        axes.scatter(*points, s=26, color=color, marker=marker, zorder=2, label=what if rows else None)
        if line:
            span = [min(points[0]) / 1.5, max(points[0]) * 1.5]
            label = f"{100 * line.scale:.3g} % x KL^{line.exponent:.2f}"
            axes.plot(span, [100 * line.flips(kl) for kl in span], color=color, linewidth=1, zorder=0, label=label)
    named = [row for row in answers or tokens if row["kl"] > 0 and row["flips"] > 0]
    for turn, row in enumerate(sorted(named, key=lambda row: row["kl"])):
        offset, side = (((-6, 9), "right"), ((6, -13), "left"))[turn % 2]
        place = (row["kl"], 100 * row["flips"])
        axes.annotate(row["setting"], place, offset, textcoords="offset points", ha=side, fontsize="small")
    axes.set(xscale="log", yscale="log", xlabel="KL to the uncompressed model, nats per token")
    axes.set(ylabel="% of items, or of tokens, that flip")
    for axis in (axes.xaxis, axes.yaxis):
        label_plainly(axis)
    axes.margins(x=0.15, y=0.12)
    axes.set_ylim(bottom=min(100 * row["flips"] for row in [*answers, *tokens] if row["flips"] > 0) / 3)
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="upper left", fontsize="small")
    save(figure, path)


def draw_places(kl: Mapping[tuple[int, str], float], title: str, path: str) -> None:
    """KL that every layer and site adds alone: kl[layer, site], in nats per token."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.add_subplot(title=title)
    sites = list(dict.fromkeys(site for _, site in kl))
    width = 0.84 / len(sites)
    for turn, (site, color) in enumerate(zip(sites, (RIGHT, WRONG, PLAIN))):
        of_site = {layer: value for (layer, where), value in kl.items() if where == site}
        places = [layer + (turn - (len(sites) - 1) / 2) * width for layer in of_site]
        axes.bar(places, of_site.values(), width, color=color, label=site)
    axes.set(yscale="log", xlabel="layer", ylabel="KL, nats per token")
    label_plainly(axes.yaxis)
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize="small")
    save(figure, path)
