# SPDX-License-Identifier: Apache-2.0
"""Which blocks do without attention's sum: lists of them, their order and classes from a sensitivity's JSON."""

import yaml

from .. import files
from ..files import shown
from ..policy import CompressionPolicy

CLASSES = ("insensitive", "sensitive", "extreme")


def parse_blocks(text: str) -> list[int]:
    """`0,3-5` as numbers. Raises ValueError for anything else."""
    blocks: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if max(len(first), len(last)) > 5:
            raise ValueError(f"blocks {shown(text)}: {shown(part)} is beyond any model's number of layers")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise ValueError(f"blocks {shown(text)}: expected numbers and ranges, as in 0,3-5")
        blocks |= set(range(int(first), int(last or first) + 1))
    return sorted(blocks)


def read_order(path: str, layers: int | None) -> list[int]:
    """All blocks of a model, from the least sensitive to the most, as `megatron-comp drop sensitivity --json` ranked
    them. layers: of the model, if they are known.

    Raises ValueError that names file, key and value for another file, or one of another model.
    """
    content = files.read_json(path, "sensitivity file")
    rows = content.get("rows") if isinstance(content, dict) else None
    try:
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"rows: {shown(rows)} is not a list of blocks")
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise ValueError(f"rows: {number}: {shown(row)} is not a block's row")
            for key in ("rank", "block"):
                if type(row.get(key)) is not int:
                    raise ValueError(f"rows: {number}: {key}: {shown(row.get(key))} is not a number")
        order = [row["block"] for row in sorted(rows, key=lambda row: (row["rank"], row["block"]))]
        if sorted(order) != list(range(len(order))):
            raise ValueError(f"rows: blocks {shown(order)} are not each of 0 to {len(order) - 1} once")
    except ValueError as error:
        message = f"sensitivity file {path}: {error}; expected what `megatron-comp drop sensitivity --json` writes"
        raise ValueError(message) from None
    if layers is not None and len(order) != layers:
        raise ValueError(f"sensitivity file {path} is of a model of {len(order)} layers; this one has {layers}")
    return order


def share_of(blocks: list[int], percent: float) -> list[int]:
    """The first so many percent of the blocks, to the nearest whole one, in order of number."""
    return sorted(blocks[: round(len(blocks) * percent / 100)])


def classify(sensitivity: float, insensitive: float, extreme: float) -> str:
    """The paper's ISB, SB and ESB: up to the first threshold, between them, above the second."""
    return CLASSES[(sensitivity > insensitive) + (sensitivity > extreme)]


def layers_that_drop(blocks: list[int]) -> dict[str, dict[str, str]]:
    """A policy's `layers` for them, neighbours in one range."""
    ranges: list[list[int]] = []
    for block in sorted(blocks):
        if ranges and block == ranges[-1][1] + 1:
            ranges[-1][1] = block
        else:
            ranges.append([block, block])
    return {f"{a}-{b}" if a != b else str(a): {"attention": "drop"} for a, b in ranges}


def dropped_blocks(policy: CompressionPolicy) -> list[int]:
    """Layers whose attention's sum a policy leaves out."""
    named = {int(end) for key in policy.layers for end in str(key).split("-")}
    return [layer for layer in range(max(named, default=-1) + 1) if policy.drops(layer)]


def write_policy(path: str, blocks: list[int], codec: str, predictor: str | None) -> None:
    words: dict[str, object] = {"codec": codec, "layers": layers_that_drop(blocks)}
    if predictor:
        words["predictor"] = files.beside(predictor, path)
    files.write_text(path, yaml.safe_dump(words, sort_keys=False))


def check_blocks(blocks: list[int], config) -> None:
    """Raises ValueError for a layer that the model does not have."""
    if blocks[-1] >= config.num_hidden_layers:
        raise ValueError(f"--blocks: the model has layers 0 to {config.num_hidden_layers - 1}, not {blocks[-1]}")
