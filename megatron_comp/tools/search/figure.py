"""The frontier that a search found, drawn from its rows."""

from pathlib import Path

KINDS = {
    "mixed": "mixed, measured",
    "preset": "one codec everywhere, measured",
    "format": "one codec everywhere, measured",
    "baseline": "simulated baseline",
}
MARKERS = ("o", "s", "s", "^")


def draw(rows: list[dict], curve: list[tuple[float, float]], bound_kl: float | None, title: str, path: str) -> None:
    """Bits a value against KL, of every tried point; named where it is not one of the search's own.

    curve: (bits, predicted KL) of the best trades.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot(title=title)
    if curve:
        axes.plot(*zip(*curve), color="C0", linewidth=1, label="mixed, predicted from sensitivities")
    for turn, (kind, label) in enumerate(KINDS.items()):
        places = [(row["bits_per_value"], row["kl"], row["name"]) for row in rows if row["kind"] == kind]
        if places:
            bits, kls, names = zip(*places)
            axes.scatter(bits, kls, s=22, color=f"C{turn}", marker=MARKERS[turn], zorder=3, label=label)
            for *place, name in places if kind != "mixed" else ():
                axes.annotate(name, place, (5, 4), textcoords="offset points", fontsize="small")
    if chosen := [row for row in rows if row["chosen"]]:
        place = chosen[0]["bits_per_value"], chosen[0]["kl"]
        axes.scatter(*place, s=120, facecolors="none", edgecolors="C3", zorder=4, label="written to the policy")
    if bound_kl:
        axes.axhline(bound_kl, color="black", linewidth=0.8, linestyle="--", label="bound")
    kls = [row["kl"] for row in rows if row["kl"] > 0]
    bits = [row["bits_per_value"] for row in rows]
    axes.set(
        yscale="log",
        ylim=(min(kls) / 2, max(kls) * 2),
        xlim=(min(bits) - 0.4, max(bits) + 0.8),
        xlabel="bits a value on the wire, scales included",
        ylabel="KL to the uncompressed model, nats a token",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(Path(path), dpi=150)
