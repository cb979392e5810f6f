# SPDX-License-Identifier: Apache-2.0
"""Draws docs/first-token.svg, the figure of README, from the rows in examples/results.

python docs/draw.py
"""

import csv
from pathlib import Path

from matplotlib.figure import Figure

from megatron_comp.launcher.figure import save

DOCS = Path(__file__).resolve().parent
ROWS = DOCS.parent / "examples" / "results" / "2026-11-21_ttft_smollm2.csv"
LINKS = {"100mbit": "100 Mbit/s", "300mbit": "300 Mbit/s", "1gbit": "1 Gbit/s"}
POLICIES = {"none": "uncompressed", "smollm2-tp2-gather.yaml": "compressed"}


def main() -> None:
    with ROWS.open() as file:
        rows = [row for row in csv.DictReader(file) if row["tp"] == "2" and row["policy"] in POLICIES]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for turn, (policy, label) in enumerate(POLICIES.items()):
        of_policy = {row["link"]: row for row in rows if row["policy"] == policy and row["link"] in LINKS}
        times = [float(of_policy[link]["ttft_ms"]) / 1000 for link in LINKS]
        bars = axes.barh([place + 0.38 * turn for place in range(len(LINKS))], times, 0.36, label=label)
        texts = [f"{seconds:.1f} s" for seconds in times]
        if policy != "none":
            speedups = (float(of_policy[link]["speedup_vs_none"]) for link in LINKS)
            texts = [f"{text}, {speedup:.2f} times as fast" for text, speedup in zip(texts, speedups)]
        axes.bar_label(bars, texts, padding=4)
    axes.set_yticks([place + 0.19 for place in range(len(LINKS))], [f"links of\n{name}" for name in LINKS.values()])
    axes.set(xlabel="seconds to the first token (median)", xlim=(0, 10.5))
    axes.invert_yaxis()
    axes.legend(loc="lower right")
    figure.suptitle(
        "Time to the first token of a 1024-token prompt, two ranks\n"
        "SmolLM2-135M in bf16, CPU; links shaped on one machine of two cores without bf16 instructions",
        fontsize="medium",
    )
    save(figure, DOCS / "first-token.svg")


if __name__ == "__main__":
    main()
