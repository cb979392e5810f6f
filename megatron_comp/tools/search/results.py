"""What a search leaves behind: the policy file, the table, the figure."""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from ...policy import CompressionPolicy
from .. import output
from .bound import Bound, perplexity_increase_pct
from .figure import draw

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


@dataclass(frozen=True)
class Found:
    """policy: to be written. point: what it measured. curve: (bits, predicted KL) of the best trades."""

    policy: CompressionPolicy
    point: dict
    bound: Bound
    curve: list[tuple[float, float]]


def report(args: argparse.Namespace, found: Found, points: list[dict], settings: dict) -> None:
    """Writes the files that were asked for, and prints every point that was measured. settings: of the state."""
    rows = [_row(point, found) for point in points]
    order = sorted(rows, key=lambda row: (row["bits_per_value"], row["kl"]))
    where = f"{Path(args.text).name}, {args.tokens // args.context} windows of {args.context} tokens"
    title = f"{Path(args.model).name}, TP={args.tp}, {args.algorithm}: {where}"
    Path(args.out).write_text(policy_text(found.policy, _header(args, found, settings)))
    output.show(f"search: {title}", COLUMNS, order)
    output.write_csv(args.csv, order)
    if args.figure:
        shown = [row for row in order if row["algorithm"] in (args.algorithm, "all_reduce")]
        draw(shown, found.curve, found.bound.limit if found.bound.by == "kl" else None, title, args.figure)
    output.write_json(args.json, vars(args), order)
    kl, bits = found.point["kl"], found.point["bits_per_value"]
    print(f"search: {found.bound}: {args.out} sends {bits:.3f} bits a value at KL {kl:.4f}", flush=True)


def _row(point: dict, found: Found) -> dict:
    nll = point["nll"]
    return {
        "name": point["name"],
        "kind": point["kind"],
        "algorithm": point["algorithm"],
        "bits_per_value": point["bits_per_value"],
        "predicted_kl": point["predicted_kl"],
        "kl": point["kl"],
        "perplexity": math.exp(nll) if nll < 700 else math.inf,
        "perplexity_increase_pct": perplexity_increase_pct(point),
        "top1_agreement": point["top1_agreement"],
        "chosen": "<- written" if point == found.point else "",
    }


def _header(args: argparse.Namespace, found: Found, settings: dict) -> list[str]:
    point, versions = found.point, output.versions()
    how = "--paper" if args.paper else f"--algorithm {args.algorithm}"
    return [
        f"Found by megatron-comp search {how}, {found.bound}",
        f"model {settings['model']}, TP={args.tp}, {settings['dtype']}; text {settings['text']}, "
        f"{args.tokens // args.context} windows of {args.context} tokens (digests: of config.json and of the text)",
        f"measured there: {point['bits_per_value']:.3f} bits a value, KL {point['kl']:.5f} nats a token, perplexity "
        f"{perplexity_increase_pct(point):+.2f} %",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]


def policy_text(policy: CompressionPolicy, header: list[str]) -> str:
    """YAML that `CompressionPolicy.from_file` reads, behind comment lines. A layer takes a line."""
    lines = [f"# {line}" for line in header]
    lines += [f"codec: {_scalar(policy.codec)}", f"algorithm: {policy.algorithm}", f"min_bytes: {policy.min_bytes}"]
    for key in ("sites", "layers"):
        if said := getattr(policy, key):
            lines.append(f"{key}:")
            lines += [f"  {name}: {_scalar(value)}" for name, value in said.items()]
    return "\n".join(lines) + "\n"


def _scalar(value: str | Mapping[str, str]) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
