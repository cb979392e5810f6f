# SPDX-License-Identifier: Apache-2.0
"""The frontier that a search found, drawn from its rows."""

from collections.abc import Mapping

from ..launcher.figure import label_plainly, save

KINDS = {
    "mixed": "mixed, measured",
    "mixed+drop": "mixed, with drops, measured",
    "preset": "one codec everywhere, measured",
    "format": "one codec everywhere, measured",
    "baseline": "simulated baseline",
}
MARKERS = ("o", "D", "s", "s", "^")
NAMED = ("preset", "format", "baseline")
COSTS = {
    "bits_per_value": "bits per value sent, scales included",
    "sums_ms": "predicted time of all sums of a prompt, ms",
}


def draw(
    rows: list[dict],
    curves: Mapping[str, list[tuple[float, float]]],
    bound_kl: float | None,
    title: str,
    path: str,
    cost: str = "bits_per_value",
) -> None:
    """`cost` of a row against its KL, of every tried point of the kinds above; those of unknown cost at the edge.

    curves: by name, (cost, predicted KL) of the best trades.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot(
        title=f"What a policy sends, and what that costs in quality (lower left is better)\n{title}"
    )
    rows = [row for row in rows if row["kind"] in KINDS]
    unplaced, rows = ([row for row in rows if (row[cost] is None) is unknown] for unknown in (True, False))
    for turn, (name, curve) in enumerate(curves.items()):
        label = f"{name}, predicted from sensitivities"
        axes.plot(*zip(*curve), color=f"C{turn}", linewidth=1, label=label)
    for turn, (kind, label) in enumerate(KINDS.items()):
        places = [(row[cost], row["kl"], row["name"]) for row in rows if row["kind"] == kind]
        if places:
            costs, kls, names = zip(*places)
            axes.scatter(costs, kls, s=22, color=f"C{turn}", marker=MARKERS[turn], zorder=3, label=label)
            for above, (*place, name) in enumerate(sorted(places) if kind in NAMED else ()):
                offset = (5, 4 if above % 2 else -10)  # names of neighbours do not overlap
                axes.annotate(name, place, offset, textcoords="offset points", fontsize="small")
    if chosen := [row for row in rows if row["chosen"]]:
        place, name = (chosen[0][cost], chosen[0]["kl"]), chosen[0]["name"]
        axes.scatter(
            *place, s=120, facecolors="none", edgecolors="C3", zorder=4, label=f"written to the policy: {name}"
        )
    for row in unplaced:
        axes.plot(1, row["kl"], "<", transform=axes.get_yaxis_transform(), color="gray", clip_on=False)
        said = f"{row['name']}: time not measured"
        axes.annotate(
            said, (1, row["kl"]), (-6, 0), axes.get_yaxis_transform(), "offset points", ha="right", fontsize="small"
        )
    if bound_kl:
        axes.axhline(bound_kl, color="black", linewidth=0.8, linestyle="--", label=f"bound: KL {bound_kl:g}")
    kls = [row["kl"] for row in (*rows, *unplaced) if row["kl"] > 0]
    costs = [row[cost] for row in rows]
    margin = 0.15 * (max(costs) - min(costs)) or 0.5
    axes.set(
        yscale="log",
        ylim=(min(kls) / 2, max(kls) * 2),
        xlim=(min(costs) - margin, max(costs) + 2 * margin),
        xlabel=COSTS[cost],
        ylabel="KL to the uncompressed model, nats per token",
    )
    label_plainly(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save(figure, path)
