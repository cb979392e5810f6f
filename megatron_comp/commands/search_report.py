# SPDX-License-Identifier: Apache-2.0
"""What a search leaves behind: the policy file, the table, the figure."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from .. import files
from ..launcher import output
from ..policy import CompressionPolicy
from ..quality.metrics import increase_pct, perplexity
from ..search.found import Found
from ..search.plot import draw
from ..spd.blocks import dropped_blocks
from .setup import text_of

if TYPE_CHECKING:
    from ..quality.judge import Judge

COLUMNS = {
    "name": ("policy", ""),
    "algorithm": ("algorithm", ""),
    "bits_per_value": ("bits/value", ".3f"),
    "predicted_kl": ("predicted KL", ".4f"),
    "kl": ("KL, nats", ".4f"),
    "perplexity": ("perplexity", ".3f"),
    "perplexity_increase_pct": ("+%", ".2f"),
    "top1_agreement": ("top-1", ".4f"),
    "chosen": ("", ""),
}


# With drops, in the place of bits per value, which leave out what is not sent.
DROP_COLUMNS = {
    "name": ("policy", ""),
    "kind": ("kind", ""),
    "dropped": ("dropped", "d"),
    "distilled": ("distilled", "d"),
    "sums_ms": ("sums, ms", ".1f"),
    "untimed": ("codecs of unknown time", ""),
} | {key: column for key, column in COLUMNS.items() if key not in ("name", "algorithm")}


def report(args: argparse.Namespace, found: Found, judge: "Judge", how: str) -> None:
    """Writes the files that were asked for, and prints every point that was measured.

    how: the command, for the policy's header.
    """
    rows, algorithm = [_row(point, found) for point in judge.points], found.policy.algorithm
    cost = "sums_ms" if found.words else "bits_per_value"
    order = sorted(rows, key=lambda row: (row[cost] is None, row[cost] or 0.0, row["kl"]))
    title = f"{Path(args.model).name}, TP={args.tp}, {algorithm}: {text_of(args)}"
    files.write_text(args.out, policy_text(found.policy, _header(args, found, judge.journal.settings, how)))
    output.show(f"search: {title}", DROP_COLUMNS if found.words else COLUMNS, order)
    output.write_csv(args.csv, order)
    if args.figure:
        shown = [row for row in order if row["algorithm"] in (algorithm, "all_reduce")]
        draw(shown, found.curves, found.bound.limit if found.bound.by == "kl" else None, title, args.figure, cost)
    output.write_json(args.json, vars(args), order)
    print(f"search: {_said(args, found)}", flush=True)


def _said(args: argparse.Namespace, found: Found) -> str:
    kl, bits = found.point["kl"], found.point["bits_per_value"]
    if not found.words:
        return f"{found.bound}: {args.out} sends {bits:.3f} bits per value at KL {kl:.4f}"
    dropped, stock = dropped_blocks(found.policy), CompressionPolicy()
    # Of the measured policy: the written one's min_bytes may keep what gains nothing.
    ms, of_stock = (1e3 * found.words.seconds(policy) for policy in (_measured_policy(found.point), stock))
    said = f"{found.bound}: {args.out} drops {len(dropped)} of attention's sums; all sums of a prompt of "
    said += f"{args.prompt_tokens} tokens are predicted to take {ms:.1f} ms instead of {of_stock:.1f}, at KL {kl:.4f}"
    if found.distilled:
        return f"{said}; to be run with --weights {args.weights_out}, which has blocks {_listed(found.distilled)}"
    if args.distilled:
        return f"{said}; no block with distilled weights was chosen, and {args.weights_out} is not written"
    return said


def _measured_policy(point: dict) -> CompressionPolicy:
    return CompressionPolicy.from_dict(json.loads(point["policy"]))


def _listed(blocks: Sequence[int]) -> str:
    return ", ".join(map(str, blocks))


def _row(point: dict, found: Found) -> dict:
    of_drops = {}
    if found.words:
        policy = _measured_policy(point)
        seconds = found.words.seconds(policy)
        of_drops = {
            "dropped": len(dropped_blocks(policy)),
            "distilled": len(point["distilled"]),
            "sums_ms": None if seconds is None else 1e3 * seconds,
            "untimed": " ".join(found.words.untimed(policy)),
        }
    return {
        "name": point["name"],
        "kind": point["kind"],
        "algorithm": point["algorithm"],
        **of_drops,
        "bits_per_value": point["bits_per_value"],
        "predicted_kl": point["predicted_kl"],
        "kl": point["kl"],
        "perplexity": perplexity(point["nll"]),
        "perplexity_increase_pct": increase_pct(point["nll"], point["base_nll"]),
        "top1_agreement": point["top1_agreement"],
        "chosen": "<- written" if point == found.point else "",
    }


def _header(args: argparse.Namespace, found: Found, settings: dict, how: str) -> list[str]:
    point, versions = found.point, output.versions()
    lines = [
        f"Found by {how}, {found.bound}",
        f"model {settings['model']}, TP={args.tp}, {settings['dtype']}; text {settings['text']}, "
        f"{args.tokens // args.context} windows of {args.context} tokens (digests: of config.json and of the text)",
        f"measured there: {point['bits_per_value']:.3f} bits per value, KL {point['kl']:.5f} nats per token, "
        f"perplexity {increase_pct(point['nll'], point['base_nll']):+.2f} %",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    if found.distilled:
        lines.append(f"goes with --weights {Path(args.weights_out).name}: distilled blocks {_listed(found.distilled)}")
    return lines


def policy_text(policy: CompressionPolicy, header: list[str]) -> str:
    """YAML that `CompressionPolicy.from_file` reads, behind comment lines. A layer takes a line."""
    lines = [f"# {line}" for line in header]
    lines += [f"codec: {_scalar(policy.codec)}", f"algorithm: {policy.algorithm}", f"min_bytes: {policy.min_bytes}"]
    for key in ("sites", "layers"):
        if said := getattr(policy, key):
            lines.append(f"{key}:")
            lines += [f"  {name}: {_scalar(value)}" for name, value in said.items()]
    if policy.predictor:
        lines.append(f"predictor: {_scalar(str(policy.predictor))}")
    return "\n".join(lines) + "\n"


def _scalar(value: str | Mapping[str, str]) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
