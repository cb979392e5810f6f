# SPDX-License-Identifier: Apache-2.0
"""The cost model beside rows of `megatron-comp bench ttft`."""

from dataclasses import replace
from pathlib import Path

from ..files import read_json
from ..launcher.network import UNSHAPED
from ..policy import CompressionPolicy
from ..wire.calibration import Calibration
from ..wire.cost import ALGORITHMS
from ..wire.topology import Islands
from .calibrations import on_wire
from .layouts import layouts_of_calibration
from .times import Job

STOCK = CompressionPolicy()

COLUMNS = {
    "layout": ("layout", ""),
    "policy": ("policy", ""),
    "algorithm": ("algorithm", ""),
    "link": ("link", ""),
    "measured_ms": ("measured ms", ".0f"),
    "predicted_ms": ("predicted ms", ".0f"),
    "error_pct": ("error, %", "+.0f"),
    "measured_speedup": ("measured x none", ".2f"),
    "predicted_speedup": ("predicted x none", ".2f"),
}
NEEDED = ("policy", "tp", "link", "prompt_tokens", "ttft_ms", "speedup_vs_none")


def rows(file: str, job: Job, compute: float | None, known: Calibration, islands: Islands | None = None) -> list[dict]:
    """A row for each of the file's whose layout is known here, on a link that was not the fastest it can be.

    compute: seconds of all but the sums on the job's ranks; where the file has an unshaped row of a layout with stock
    sums, that row's time, pipelines' waiting included, takes its place.
    islands: of the ranks; then `known` is of the rows' links already, since a rate does not tell what two levels take.

    Raises ValueError for a file that `bench ttft --json` did not write, or without a row of so many ranks and tokens.
    """
    try:
        content = read_json(file, "--measured")
        found = [
            {"pp": 1, "algorithm": None} | {key: row[key] for key in row.keys() & {*NEEDED, "pp", "algorithm"}}
            for row in content["rows"]
            if [row[key] for key in NEEDED]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--measured {file}: not what `bench ttft --json` writes: {error!r}") from None
    layouts = {(each.tp, each.stages): each for each in layouts_of_calibration(known, islands, job)}
    found = [row for row in found if row["prompt_tokens"] == job.tokens and (row["tp"], row["pp"]) in layouts]
    unshaped = {
        (row["tp"], row["pp"]): row["ttft_ms"] / 1e3
        for row in found
        if row["link"] == UNSHAPED and row["policy"] == "none"
    }
    found = [row for row in found if not (row["link"] == UNSHAPED and (row["tp"], row["pp"]) in unshaped)]
    if islands and len(links := sorted({row["link"] for row in found})) > 1:
        raise ValueError(f"--measured {file}: rows of several links, {', '.join(links)}: keep those of one")
    made = []
    for row in found:
        layout = layouts[row["tp"], row["pp"]]
        if not islands and row["link"] not in ("local", UNSHAPED, "network"):
            layout = replace(layout, calibration=on_wire(known, row["link"]))
        rest = unshaped.get((row["tp"], row["pp"]), compute)
        if rest is None:
            raise ValueError(f"--measured {file}: give --compute-ms, or an unshaped row of {layout.name}")
        stock, seconds = (rest + layout.seconds_of_link(job, each, rest) for each in (STOCK, _policy(row, file)))
        made.append(
            {
                "layout": layout.name,
                "policy": row["policy"],
                "algorithm": row["algorithm"],
                "link": row["link"],
                "measured_ms": row["ttft_ms"],
                "predicted_ms": seconds * 1e3,
                "error_pct": 100 * (seconds * 1e3 / row["ttft_ms"] - 1),
                "measured_speedup": row["speedup_vs_none"],
                "predicted_speedup": stock / seconds,
            }
        )
    if not made:
        raise ValueError(f"--measured {file}: no row of {job.tp} ranks and {job.tokens} tokens")
    return made


def _policy(row: dict, file: str) -> CompressionPolicy:
    """Of a codec's name, every sum compressed as the row says; or of a policy file."""
    if row["policy"] == "none":
        return CompressionPolicy()
    if Path(row["policy"]).is_file():
        return CompressionPolicy.from_file(row["policy"])
    algorithm = row["algorithm"] if row["algorithm"] in ALGORITHMS else "auto"
    try:
        return CompressionPolicy(codec=row["policy"], algorithm=algorithm, min_bytes=0)
    except ValueError:
        raise ValueError(
            f"--measured {file}: row of {row['policy']}: neither a codec nor a policy file that is there"
        ) from None
