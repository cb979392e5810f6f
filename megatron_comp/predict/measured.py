# SPDX-License-Identifier: Apache-2.0
"""The cost model beside rows of `megatron-comp bench ttft`."""

from pathlib import Path

from ..files import read_json
from ..policy import CompressionPolicy
from ..wire.calibration import Calibration
from ..wire.cost import ALGORITHMS
from ..wire.topology import Islands
from .calibrations import on_wire
from .times import Job, sums

COLUMNS = {
    "policy": ("policy", ""),
    "link": ("link", ""),
    "measured_ms": ("measured ms", ".0f"),
    "predicted_ms": ("predicted ms", ".0f"),
    "error_pct": ("error, %", "+.0f"),
    "measured_speedup": ("measured x none", ".2f"),
    "predicted_speedup": ("predicted x none", ".2f"),
}
NEEDED = ("policy", "tp", "link", "prompt_tokens", "ttft_ms", "speedup_vs_none")


def rows(file: str, job: Job, compute: float, known: Calibration, islands: Islands | None = None) -> list[dict]:
    """A row for each of the file's that is of this job: compute in seconds, sums over the row's link.

    islands: of the ranks; then `known` is of the rows' links already, since a rate does not tell what two levels take.

    Raises ValueError for a file that `bench ttft --json` did not write, or without a row of so many ranks and tokens.
    """
    try:
        content = read_json(file, "--measured")
        found = [{key: row[key] for key in NEEDED} | {"algorithm": row.get("algorithm")} for row in content["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--measured {file}: not what `bench ttft --json` writes: {error!r}") from None
    found = [row for row in found if (row["tp"], row["prompt_tokens"]) == (job.tp, job.tokens)]
    if islands and len(links := sorted({row["link"] for row in found})) > 1:
        raise ValueError(f"--measured {file}: rows of several links, {', '.join(links)}: keep those of one")
    made = []
    for row in found:
        there = known if islands or row["link"] in ("local", "unshaped", "network") else on_wire(known, row["link"])
        seconds = compute + sums(job, _policy(row, file), there, compute, islands).seconds
        stock = compute + sums(job, CompressionPolicy(), there).seconds
        made.append(
            {
                "policy": row["policy"],
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
