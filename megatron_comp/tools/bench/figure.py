"""The figure of `megatron-comp bench codec`, drawn from its rows and nothing else."""

from pathlib import Path

LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")


def draw(rows: list[dict], path: str | Path) -> None:
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
    figure = Figure(figsize=(4.5 * across, 3.6 * down + 1.2), layout="constrained")
    for place, (op, ranks) in enumerate(panels, start=1):
        axes = figure.add_subplot(down, across, place, title=op if op == "encode" else f"{op}, {ranks} ranks")
        its_rows = [row for row in rows if (row["op"], row["ranks"]) == (op, ranks)]
        if len(sizes) > 1:
            _lines(axes, its_rows, sizes, codecs, backends)
        else:
            _bars(axes, its_rows, codecs, backends)
    legend = {text: handle for axes in figure.axes for handle, text in zip(*axes.get_legend_handles_labels())}
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4, fontsize="small")
    shapes = ", ".join(f"{rows}x{hidden}" for rows, hidden in sizes)
    versions = ", ".join(f"{name} {rows[0][name]}" for name in ("torch", "triton", "megatron_comp") if rows[0][name])
    figure.suptitle(
        f"Bytes moved a second, as a share of what a plain copy moves: {shapes} {rows[0]['dtype']}\n"
        f"{rows[0]['device']}; {versions}; {rows[0]['date']}"
    )
    figure.savefig(path, dpi=150)


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
