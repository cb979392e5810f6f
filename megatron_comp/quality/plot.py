# SPDX-License-Identifier: Apache-2.0
"""Figures of what compression costs: answers that flip, the KL that goes with it, and where in the model KL begins."""

from collections.abc import Mapping, Sequence

from ..launcher.figure import save
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


def draw_relation(rows: Sequence[dict], fit: Fit | None, path: str) -> None:
    """Flips over KL of all settings that have both, each with its interval, and the fitted line.

    rows: of `relation.relate`.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["kl"] > 0 and row["flips"] > 0]
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.add_subplot(title="Answers that flip, by KL on text; whiskers: 95 % interval of the flips")
    for turn, row in enumerate(rows):
        kl, flips = row["kl"], 100 * row["flips"]
        ends = [100 * (row["flips"] if row[f"flips_{end}"] is None else row[f"flips_{end}"]) for end in ("low", "high")]
        axes.errorbar(kl, flips, [[flips - ends[0]], [ends[1] - flips]], fmt="o", color=RIGHT, ecolor="#9aa5b1")
        offset = (7, -12) if turn % 2 else (-7, 9)
        side = "left" if turn % 2 else "right"
        axes.annotate(row["setting"], (kl, flips), offset, textcoords="offset points", ha=side, fontsize="small")
    if fit:
        span = [min(row["kl"] for row in rows) / 1.5, max(row["kl"] for row in rows) * 1.5]
        label = f"flips = {100 * fit.scale:.3g} % x KL^{fit.exponent:.2f}"
        axes.plot(span, [100 * fit.flips(kl) for kl in span], color=WRONG, linewidth=1, zorder=0, label=label)
        axes.legend(loc="upper left")
    axes.set(xscale="log", yscale="log", xlabel="KL to the uncompressed model, nats per token")
    axes.set(ylabel="answers that turned wrong or right, % of items")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")
    axes.margins(x=0.18, y=0.15)
    axes.grid(alpha=0.3, which="both")
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
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize="small")
    save(figure, path)
