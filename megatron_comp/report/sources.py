# SPDX-License-Identifier: Apache-2.0
"""Files that other commands wrote, read for a page."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..files import read_json, shown
from ..quality.items import Run
from ..quality.paired import compare

# What a page needs of a row.
NUMBERS = {
    "evaluate": ("bits_per_value", "perplexity", "perplexity_increase_pct", "kl", "top1_agreement", "bytes_per_rank"),
    "ttft": ("tp", "prompt_tokens", "ttft_ms", "p20_ms", "p80_ms", "speedup_vs_none", "bytes_per_rank"),
    "search": ("bits_per_value", "kl", "perplexity_increase_pct"),
    "drop": ("block", "kl"),
}
TEXTS = {
    "evaluate": ("codec", "algorithm"),
    "ttft": ("policy", "algorithm", "link", "dtype", "device", "torch", "triton", "megatron_comp", "date"),
    "search": ("name", "kind", "algorithm", "chosen"),
    "drop": (),
}
# Of these, numbers that a codec may have ruined: not finite, which JSON has as null.
MAY_BE_RUINED = ("perplexity", "perplexity_increase_pct", "kl", "top1_agreement")
SOURCES = {
    "evaluate": "`megatron-comp evaluate --text`",
    "ttft": "`megatron-comp bench ttft`",
    "search": "`megatron-comp search`",
    "drop": "`megatron-comp drop sensitivity`",
}


@dataclass(frozen=True)
class Rows:
    """A file's rows. command, config and versions: of a JSON file; a CSV file has none."""

    path: str
    rows: list[dict]
    command: str = ""
    config: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the text that was measured, or of the file where it names none."""
        text = self.config.get("text")
        return Path(text).name if isinstance(text, str) else Path(self.path).name

    @property
    def scored(self) -> str:
        """Of a text, also how much of it was scored."""
        words = (self.config.get("tokens"), self.config.get("context"))
        if not all(isinstance(word, int) and word > 0 for word in words):
            return self.name
        return f"{self.name} ({words[0] // words[1]} windows of {words[1]} tokens)"


@dataclass(frozen=True)
class Sensitivity:
    """KL that each layer's and site's rounding error alone costs: kl[layer, site], in nats per token.

    codec: whose error; for dropped sums `drop`.
    """

    path: str
    codec: str
    kl: dict[tuple[int, str], float]


@dataclass(frozen=True)
class Inputs:
    """What was given. evaluate: a file for each text. items: the uncompressed run, then the others."""

    evaluate: Sequence[Rows] = ()
    items: Sequence[Run] = ()
    ttft: Sequence[Rows] = ()
    search: Rows | None = None
    sensitivity: Sensitivity | None = None
    policies: Sequence[tuple[str, str]] = ()
    """Names and contents of files."""

    def compared(self) -> list[dict]:
        """Rows of `paired.compare`, of every setting."""
        base, *others = self.items or (None,)
        return [row for said in others for row in compare(base, said)]


def read_rows(path: str, kind: str) -> Rows:
    """Rows of `--json` or `--csv` of a command; kind: a key of `NUMBERS`.

    Raises ValueError that names file, row and column for what no such command writes, OSError if it cannot be opened.
    """
    content = Path(path).read_bytes()
    if content.lstrip()[:1] in (b"{", b"["):
        found = read_json(path, "file")
        rows = found.get("rows") if isinstance(found, dict) else None
        if not isinstance(rows, list):
            raise ValueError(f"{path} has no rows: expected what `--json` of a command writes")
        extra = {key: dict(found[key]) for key in ("config", "versions") if isinstance(found.get(key), dict)}
        extra["command"] = str(found.get("command") or "")
    else:
        rows, extra = _read_csv(path, content), {}
    if not rows:
        raise ValueError(f"{path} has no rows")
    return Rows(path, [_checked(row, kind, f"{path}, row {place}") for place, row in enumerate(rows, 1)], **extra)


def _read_csv(path: str, content: bytes) -> list[dict]:
    try:
        lines = content.decode("utf-8-sig").splitlines()
        return [dict(row) for row in csv.DictReader(lines, strict=True)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is neither JSON nor CSV: {error}") from None


def _checked(row: object, kind: str, where: str) -> dict:
    """Numbers as numbers, texts as texts. None stands for an empty field and for what is not finite."""
    wanted = (*TEXTS[kind], *NUMBERS[kind])
    if not isinstance(row, dict) or (missing := [key for key in wanted if key not in row]):
        lacks = f": it lacks {', '.join(missing)}" if isinstance(row, dict) else ""
        raise ValueError(f"{where} is not one of {SOURCES[kind]}{lacks}")
    made = {key: str(row[key] or "") if key in TEXTS[kind] else _number(value) for key, value in row.items()}
    for key in NUMBERS[kind]:
        if not isinstance(made[key], (int, float)) and not (made[key] is None and key in MAY_BE_RUINED):
            raise ValueError(f"{where}: {key} {shown(made[key])} is not a number")
    return made


def _number(value: object) -> object:
    """A finite number as such; None for an empty field and for what is not finite; anything else as it is."""
    if isinstance(value, str):
        try:
            value = int(value) if value.isdecimal() else float(value)
        except ValueError:
            return value or None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_sensitivity(path: str) -> Sensitivity:
    """From `--state` of `megatron-comp search`, of its candidate nearest to 4.5 bits per value; or rows of
    `megatron-comp drop sensitivity`.

    Raises ValueError that names the file for what is neither, OSError if it cannot be opened.
    """
    state = read_json(path, "file") if Path(path).read_bytes().lstrip()[:1] == b"{" else {}
    if not isinstance(state, dict) or "sensitivity" not in state:
        rows = read_rows(path, "drop").rows
        return Sensitivity(path, "drop", {(row["block"], "attention"): row["kl"] for row in rows if row["kl"]})
    try:
        settings, seen = state["settings"], state["sensitivity"]
        tokens, rows = seen["windows"] * (settings["context"] - 1), seen["rows"]
        bits = [8 * nbytes / rows[0]["values"] for nbytes in rows[0]["nbytes"]]
        place = min(range(len(bits)), key=lambda candidate: abs(bits[candidate] - 4.5))
        kl = {(int(row["layer"]), str(row["site"])): row["damage"][0][place] / tokens for row in rows}
        return Sensitivity(path, str(settings["candidates"][place]), kl)
    except (KeyError, TypeError, IndexError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is not a state of `megatron-comp search`: {error!r}") from None


def with_short_names(inputs: Inputs) -> Inputs:
    """Settings that are policy files under the last part of their path, where that tells them apart."""
    settings = {run.setting for run in inputs.items}
    settings |= {row["codec"] for rows in inputs.evaluate for row in rows.rows}
    settings |= {row["policy"] for rows in inputs.ttft for row in rows.rows}
    names = {setting: Path(setting).name if setting.endswith((".yaml", ".yml")) else setting for setting in settings}
    if len(set(names.values())) < len(names):
        return inputs
    return replace(
        inputs,
        evaluate=[replace(r, rows=[row | {"codec": names[row["codec"]]} for row in r.rows]) for r in inputs.evaluate],
        ttft=[replace(r, rows=[row | {"policy": names[row["policy"]]} for row in r.rows]) for r in inputs.ttft],
        items=[replace(run, header=run.header | {"setting": names[run.setting]}) for run in inputs.items],
    )
