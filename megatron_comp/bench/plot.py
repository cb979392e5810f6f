# SPDX-License-Identifier: Apache-2.0
"""The figures of `megatron-comp bench`, drawn from its rows and nothing else."""

from collections.abc import Callable
from pathlib import Path

from ..launcher.figure import save

LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")

Namer = Callable[[dict], str]


def draw_codecs(rows: list[dict], path: str | Path) -> None:
    """`share_of_copy` of every row, a panel for each op and number of ranks; `rows` as in the CSV file.

    Lines over the size of the tensor where there are several, else bars.
    """
    from matplotlib.figure import Figure

    sizes = {(row["rows"], row["hidden"]): row["bytes_moved"] / 2e6 for row in rows if row["op"] == "copy"}
    rows = [row for row in rows if row["codec"] != "none"]
    codecs, backends = (list(dict.fromkeys(row[key] for row in rows)) for key in ("codec", "backend"))
    panels = list(dict.fromkeys((row["op"], row["ranks"]) for row in rows))
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    height = 3.6 if len(sizes) > 1 else max(3.6, 0.15 * len(codecs) * len(backends) + 0.8)  # labels do not overlap
    figure = Figure(figsize=(4.5 * across, height * down + 1.2), layout="constrained")
    for place, (op, ranks) in enumerate(panels, start=1):
        axes = figure.add_subplot(down, across, place, title=_operation(op, ranks))
        its_rows = [row for row in rows if (row["op"], row["ranks"]) == (op, ranks)]
        if len(sizes) > 1:
            _lines(axes, its_rows, sizes, codecs, backends)
        else:
            _bars(axes, its_rows, codecs, backends)
    legend = {text: handle for axes in figure.axes for handle, text in zip(*axes.get_legend_handles_labels())}
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4, fontsize="small")
    shapes = ", ".join(f"{rows}x{hidden}" for rows, hidden in sizes)
    figure.suptitle(
        f"Speed of codecs: bytes moved per second, as a share of what a plain copy moves (black line = copy).\n"
        f"Tensors of {shapes}, {rows[0]['dtype']}, longer bars are faster\n"
        f"{_circumstances(rows[0])}"
    )
    save(figure, path)


def _operation(op: str, ranks: int) -> str:
    return {
        "encode": "encode",
        "decode_sum": f"decode and sum, {ranks} ranks",
        "decode_sum_encode": f"decode, sum and encode, {ranks} ranks",
    }.get(op, f"{op}, {ranks} ranks")


def _lines(axes, rows: list[dict], sizes: dict, codecs: list[str], backends: list[str]) -> None:
    for codec, backend in dict.fromkeys((row["codec"], row["backend"]) for row in rows):
        points = sorted(
            (sizes[row["rows"], row["hidden"]], row["share_of_copy"])
            for row in rows
            if (row["codec"], row["backend"]) == (codec, backend)
        )
        turn = backends.index(backend) % len(LINE_STYLES)
        style = {"color": f"C{codecs.index(codec)}", "linestyle": LINE_STYLES[turn], "marker": MARKERS[turn]}
        axes.plot(*zip(*points), label=f"{codec}, {backend}", **style)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", ylim=(0, None), xlabel="MB of one rank's tensor")


def _bars(axes, rows: list[dict], codecs: list[str], backends: list[str]) -> None:
    height = 0.8 / len(backends)
    for turn, backend in enumerate(backends):
        if its_rows := [row for row in rows if row["backend"] == backend]:
            places = [codecs.index(row["codec"]) + height * turn for row in its_rows]
            shares = [row["share_of_copy"] for row in its_rows]
            bars = axes.barh(places, shares, height, label=backend, color=f"C{turn}")
            axes.bar_label(bars, fmt="{:.1%}", padding=2, fontsize="x-small")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(codecs))], codecs)
    axes.set(xlim=(0, None), ylim=(len(codecs) - 0.2, -0.4))


def draw_times(
    rows: list[dict], path: str | Path, title: str, *, panel: Namer, bar: Namer, time: str, speedup: str
) -> None:
    """Milliseconds in the column `time` as bars with a whisker from p20 to p80, each with its `speedup`.

    panel, bar: the name of the panel that a row belongs to, and of its bar. A tick marks what the wire alone would take
    where rows have a `share_of_wire_limit`. A hatched bar is a policy that compressed no sum.
    """
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(map(panel, rows)))
    names = list(dict.fromkeys(map(bar, rows)))
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(max(9, 5 * across + 1.5), (0.32 * len(names) + 1) * down + 1), layout="constrained")
    all_axes = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for axes in all_axes[len(panels) :]:
        axes.remove()
    for axes, of_panel in zip(all_axes, panels):
        its_rows = [row for row in rows if panel(row) == of_panel]
        places = [names.index(bar(row)) for row in its_rows]
        times = [row[time] for row in its_rows]
        whiskers = [[row[time] - row["p20_ms"] for row in its_rows], [row["p80_ms"] - row[time] for row in its_rows]]
        colors = [f"C{place % 10}" for place in places]
        hatches = ["//" if _uncompressed(row) else "" for row in its_rows]
        bars = axes.barh(places, times, 0.7, xerr=whiskers, color=colors, ecolor="gray", hatch=hatches, edgecolor="w")
        labels = [f"{_short(row[time])} ({row[speedup]:.2f}x)" for row in its_rows]
        axes.bar_label(bars, labels, padding=4, fontsize="small")
        for place, row in zip(places, its_rows):
            if share := row.get("share_of_wire_limit"):
                axes.plot([share * row[time]] * 2, [place - 0.35, place + 0.35], color="black")
        axes.set(
            title=of_panel,
            xlabel="milliseconds; black tick: bytes over the link's rate" if axes.lines else "milliseconds",
            xlim=(0, 1.35 * max(row["p80_ms"] for row in its_rows)),
        )
        axes.set_yticks(range(len(names)), names)
    all_axes[0].invert_yaxis()
    how = "median, whisker from the 20th to the 80th percentile; in brackets: times as fast as stock"
    if any(map(_uncompressed, rows)):
        how += "; hatched: a policy that compressed no sum here"
    figure.suptitle(f"{title}\n{how}\n{_circumstances(rows[0])}", fontsize="medium")
    save(figure, path)


def _circumstances(row: dict) -> str:
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "triton", "megatron_comp") if row[name])
    return f"{row['device']}; {versions}; {row['date']}"


def _uncompressed(row: dict) -> bool:
    """Whether a policy compressed no sum in this row."""
    return row.get("policy", "none") != "none" and row["algorithm"] == "all_reduce"


def _short(milliseconds: float) -> str:
    """Four digits, and all that are before the point."""
    return f"{milliseconds:.4g}" if milliseconds < 1000 else f"{milliseconds:.0f}"
