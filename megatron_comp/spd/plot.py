# SPDX-License-Identifier: Apache-2.0
"""Figures of `megatron-comp drop`, drawn from its rows."""

from ..launcher.figure import save


def draw_sensitivity(rows: list[dict], measure: str, path: str) -> None:
    """Both measures by block; blocks coloured by class."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    colours = {"insensitive": "C2", "sensitive": "C1", "extreme": "C3"}
    for name in colours:
        of_class = [row for row in rows if row["class"] == name]
        for axes, key in ((upper, "perplexity_delta"), (lower, "kl")):
            axes.bar(
                [row["block"] for row in of_class], [row[key] for row in of_class], color=colours[name], label=name
            )
    upper.set(ylabel="perplexity, blocks i to last dropped,\nminus blocks i+1 to last", yscale="symlog")
    lower.set(ylabel="KL with this block alone dropped,\nnats per token", xlabel="block", yscale="log")
    by = "perplexity" if measure == "perplexity_delta" else "KL"
    upper.set_title(f"What leaving out one block's attention sum costs; colour: class of the block, by {by}")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    upper.legend(fontsize="small")
    save(figure, path)


def draw_curve(rows: list[dict], path: str) -> None:
    """Increase of perplexity and KL by share of dropped sums, a line for each order and codec."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key in dict.fromkeys((row["order"], row["codec"]) for row in rows):
        line = [row for row in rows if (row["order"], row["codec"]) == key]
        percents = [row["percent"] for row in line]
        label = key[0] if key[1] == "none" else f"{key[0]}, {key[1]}"
        left.plot(percents, [row["perplexity_increase_pct"] for row in line], marker="o", label=label)
        right.plot(percents, [row["kl"] for row in line], marker="o", label=label)
    left.axhline(3, color="black", linewidth=0.8, linestyle="--", label="3 %")
    left.set(ylabel="increase of perplexity, %", yscale="symlog")
    left.set_ylim(bottom=min(row["perplexity_increase_pct"] for row in rows) - 0.5)
    right.set(ylabel="KL to the full model, nats per token", yscale="symlog")
    right.set_yscale("symlog", linthresh=0.01)
    for axes in (left, right):
        axes.set(xlabel="attention sums dropped, %")
        axes.grid(alpha=0.3)
    figure.suptitle("What leaving out attention's sums costs in quality")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    save(figure, path)
