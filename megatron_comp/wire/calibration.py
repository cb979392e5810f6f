# SPDX-License-Identifier: Apache-2.0
"""What a group's link and codecs cost: measured by `megatron-comp calibrate` and kept in a file, or assumed.

The file is YAML:

    schema: 1
    measured: {ranks: 3, hosts: 1, backend: gloo, device: cpu, dtype: float32, ...}   # and versions, date
    links:                              # seconds of a call = latency_s + bytes that a rank receives / bytes_per_s
      all_reduce:                       # the stock collectives, their bytes those of a ring
        {bytes_per_s: 1.2e9, latency_s: 1.0e-4, points: [[4096, 1.1e-4], [65536, 1.3e-4]]}   # (bytes, seconds) of the
      reduce_scatter: ...                                        # smaller messages, ascending; if absent, none
      all_gather: ...                                            # of messages
      all_to_all: ...
    inside: {all_gather: ..., all_to_all: ...}   # of ranks of one machine, all machines at once; if absent, not known
    across: {all_gather: ..., all_to_all: ...}   # of ranks of equal place in all machines, all places at once
    codecs:                             # seconds of a call = its fixed_s + values * its s_per_value
      fp4_e2m1:32:e8m0: {encode_fixed_s: ..., encode_s_per_value: ..., decode_fixed_s: ..., decode_s_per_value: ...}
    margin: 0.1                         # compress where stock is predicted to take more than 1.1 times as long
    hidden: 0.8                         # of the shorter of codec and wire, what sums in many chunks hide; if absent, 1
"""

import bisect
import math
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from ..files import cache_folder, shown, write_text
from ..yaml_files import read_yaml
from . import exchange
from .codec import Codec

SCHEMA = 1
DEVICES = ("cpu", "cuda")
VARIABLE = "MEGATRON_COMP_CALIBRATION"
# What a prediction must gain before a message is compressed, where a file does not say more.
MARGIN = 0.1


@dataclass(frozen=True)
class Link:
    """A collective's time, by the bytes that each rank receives.

    points: measured (bytes, seconds), ascending; up to the last of them times are interpolated, beyond it they lie on
    the line. No line holds for all sizes: switches and shapers let the first bytes pass faster than those that follow.
    """

    bytes_per_s: float
    latency_s: float
    points: tuple[tuple[float, float], ...] = ()

    def seconds(self, nbytes: float) -> float:
        place = bisect.bisect_right(self.points, nbytes, key=lambda point: point[0])
        if place == len(self.points):
            return self.latency_s + nbytes / self.bytes_per_s
        if len(self.points) == 1:
            return self.points[0][1]
        (low, fast), (high, slow) = self.points[max(place - 1, 0) :][:2]
        between = fast + (slow - fast) * (nbytes - low) / (high - low)
        # Below the first point the same line, as far as latencies can be: neither negative nor more than all its time.
        return between if place else min(max(between, fast * nbytes / low), fast)


@dataclass(frozen=True)
class CodecCost:
    """A codec's time on one rank while all ranks work: of a tensor's values encoded, of all messages' decoded."""

    encode_fixed_s: float = 0.0
    encode_s_per_value: float = 0.0
    decode_fixed_s: float = 0.0
    decode_s_per_value: float = 0.0


# What `auto` assumes of a link that nobody has measured: 25 Gbit/s each way, 50 us for a collective to start.
ASSUMED_LINK = Link(25e9 / 8, 50e-6)
# And between ranks of one machine: half of what 16 lanes of PCIe 4.0 carry, 20 us for a collective to start.
ASSUMED_INSIDE = Link(16e9, 20e-6)
LINKS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
# The collectives of one level of a hierarchical sum.
LEVEL_LINKS = ("all_gather", "all_to_all")


@dataclass(frozen=True)
class Calibration:
    """What predictions rest on; without arguments one assumed link, on which codecs take no time.

    codecs: by their full names, as `str(codec)` gives them. ranks: of the group that was measured; None: any.
    """

    links: Mapping[str, Link] = field(default_factory=lambda: dict.fromkeys(LINKS, ASSUMED_LINK))
    codecs: Mapping[str, CodecCost] = field(default_factory=dict)
    margin: float = MARGIN
    measured: Mapping[str, Any] = field(default_factory=dict)
    """When, where and in what; empty: nothing was."""
    source: str = "assumed: 25 Gbit/s, 50 us per collective, codecs take no time"
    hidden: float = 1.0
    """Share of the shorter of codec and wire that many chunks hide: 1 where they run side by side, 0 where they share
    a processor that is busy already."""
    compresses: bool = True
    """False: the link is taken to be so fast that `min_bytes: auto` compresses nothing on it."""
    inside: Mapping[str, Link] = field(default_factory=dict)
    """Of the ranks of one island, for hierarchical sums; empty where they are not known apart from `links`."""
    across: Mapping[str, Link] = field(default_factory=dict)
    """Of the ranks of one place in all islands, while those of the other places exchange too; known with `inside`."""

    @property
    def ranks(self) -> int | None:
        return self.measured.get("ranks")

    @property
    def device(self) -> torch.device:
        """Of the calibration; cuda if nothing was measured."""
        return torch.device(self.measured.get("device", "cuda"))

    @property
    def largest_bytes(self) -> float:
        """Of the stock all-reduce that was measured, what each rank received; infinite where no sizes are known."""
        points = self.links["all_reduce"].points
        return points[-1][0] if points else math.inf

    @property
    def itemsize(self) -> int:
        """Bytes per value of the tensors that were measured; 2 where nothing was."""
        return getattr(torch, str(self.measured.get("dtype")), torch.bfloat16).itemsize

    @property
    def chunk_bytes(self) -> int | None:
        """Of a message, in each chunk at least; None: all in one chunk."""
        predicted = exchange.PREDICTED_CHUNK_BYTES if self.codecs else None
        return exchange.chunk_bytes(self.device.type) or predicted

    def knows(self, codec: Codec) -> bool:
        """Whether this codec's time was measured, or none was."""
        return not self.codecs or str(codec) in self.codecs

    def cost(self, codec: Codec) -> CodecCost:
        """Of a codec; that of the slowest known one where it was not measured among others."""
        if not self.codecs:
            return CodecCost()
        known = self.codecs.get(str(codec))
        return known or CodecCost(*(max(getattr(each, f.name) for each in self.codecs.values()) for f in _COSTS))

    @classmethod
    def from_file(cls, path: str | Path) -> "Calibration":
        """Raises ValueError that names file and key for what is no calibration, OSError if it cannot be read."""
        content = read_yaml(path, "calibration file")
        try:
            return cls._from_content(content, str(path))
        except ValueError as error:
            raise ValueError(f"calibration file {path}: {error}; `megatron-comp calibrate` writes one") from None

    @classmethod
    def _from_content(cls, content: object, source: str) -> "Calibration":
        keys = ("schema", "measured", "links", "inside", "across", "codecs", "margin", "hidden")
        absent = {"hidden": 1.0, "inside": None, "across": None}
        content = _mapping("", absent | content if isinstance(content, dict) else content, keys)
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {shown(content['schema'])} is not {SCHEMA}, which this version reads")
        measured = _mapping("measured", content["measured"])
        if type(measured.get("ranks")) is not int or measured["ranks"] < 2:
            raise ValueError(f"measured: ranks: {shown(measured.get('ranks'))} is not a number of ranks above 1")
        if measured.get("device") not in DEVICES:
            raise ValueError(f"measured: device: {shown(measured.get('device'))} is not one of {', '.join(DEVICES)}")
        if not isinstance(getattr(torch, str(measured.get("dtype")), torch.bfloat16), torch.dtype):
            raise ValueError(f"measured: dtype: {shown(measured['dtype'])} is not a type of torch's, as float32 is")
        links = _links("links", content["links"], LINKS)
        if (content["inside"] is None) != (content["across"] is None):
            raise ValueError("inside, across: one of them is missing; they were measured together or not at all")
        levels = [_links(key, content[key], LEVEL_LINKS) for key in ("inside", "across") if content[key] is not None]
        inside, across = levels or ({}, {})
        codecs = {
            str(Codec.parse(name)): CodecCost(**_numbers(f"codecs: {name}", numbers, CodecCost))
            for name, numbers in _mapping("codecs", content["codecs"]).items()
        }
        if not codecs:
            raise ValueError("codecs: none was measured")
        hidden = _number("hidden", content["hidden"])
        if hidden > 1:
            raise ValueError(f"hidden: {hidden} is a share above 1")
        margin = _number("margin", content["margin"])
        return cls(links, codecs, margin, measured, source, hidden, inside=inside, across=across)

    def write(self, path: str | Path) -> None:
        """As `from_file` reads it; whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "schema": SCHEMA,
            "measured": dict(self.measured),
            "links": _written(self.links),
            **{key: _written(level) for key in ("inside", "across") if (level := getattr(self, key))},
            "codecs": {name: asdict(cost) for name, cost in self.codecs.items()},
            "margin": self.margin,
            "hidden": self.hidden,
        }
        write_text(path, yaml.safe_dump(content, sort_keys=False, width=120))


ASSUMED = Calibration(
    inside=dict.fromkeys(LEVEL_LINKS, ASSUMED_INSIDE),
    across=dict.fromkeys(LEVEL_LINKS, ASSUMED_LINK),
)
# Of GPUs of one machine that reach one another's memory, by NVLink or over PCIe: a stock sum takes less time there than
# launching the kernels of a compressed one, as far as anybody knows who has not measured it.
ASSUMED_PEERS = Calibration(
    source="assumed: GPUs of one machine with access to one another's memory; `auto` compresses nothing there",
    compresses=False,
)

_COSTS = fields(CodecCost)


def default_path(ranks: int, hosts: int, backend: str, device: str, graphs: bool = False) -> Path:
    """Where `calibrate` leaves its file, and others look for it.

    In `calibration/` of the folder that MEGATRON_COMP_CACHE names (default: `~/.cache/megatron_comp`), under what tells
    groups apart: also the link that MEGATRON_COMP_LINK names, as `launch/slow_network.sh` does, or between machines the
    network interface that GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names. Ranks of one machine reach one another by
    loopback or by GPUs' own links, whichever interface is named.

    graphs: of replays of CUDA graphs, in which Python takes no time.
    """
    interface = os.environ.get(f"{backend.upper()}_SOCKET_IFNAME", "") if hosts > 1 else ""
    interface = os.environ.get("MEGATRON_COMP_LINK") or interface
    parts = [backend, device, f"{ranks}ranks", f"{hosts}hosts", interface, "graphs" if graphs else ""]
    name = "_".join("".join(c if c.isalnum() else "-" for c in part) for part in parts if part)
    return cache_folder() / "calibration" / f"{name}.yaml"


def find_calibration(ranks: int, hosts: int, backend: str, device: str, graphs: bool = False) -> Calibration:
    """Those of a group: of the file that MEGATRON_COMP_CALIBRATION names, else of the default path, else assumed.

    The word `assumed` in that variable leaves every file unread. Raises ValueError for a file that is not there, cannot
    be read, is no calibration, or is of another number of ranks or kind of device.

    graphs: sums are captured in CUDA graphs. Where nobody measured replays, what was measured without graphs holds.
    """
    given = os.environ.get(VARIABLE)
    if given == "assumed":
        return ASSUMED
    path = Path(given) if given else default_path(ranks, hosts, backend, device, graphs)
    if graphs and not given and not path.exists():
        path = default_path(ranks, hosts, backend, device)
    if not given and not path.exists():
        return ASSUMED
    try:
        calibration = Calibration.from_file(path)
    except OSError as error:
        raise ValueError(f"calibration file {path}{f' of {VARIABLE}' * bool(given)}: {error.strerror}") from None
    if calibration.ranks != ranks:
        raise ValueError(
            f"calibration file {path} was measured with {calibration.ranks} ranks, this group has {ranks}: calibrate "
            f"again, or set {VARIABLE}=assumed"
        )
    if calibration.device.type != device:
        raise ValueError(
            f"calibration file {path} was measured on {calibration.device.type}, this group is on {device}: calibrate "
            f"again, or set {VARIABLE}=assumed"
        )
    return calibration


def _mapping(where: str, value: object, keys: tuple[str, ...] | None = None) -> dict:
    """`value`, if it is a mapping from text with just these keys."""
    prefix = f"{where}: " if where else ""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{prefix}expected names with values, got {shown(value)}")
    for key in value:
        if keys and key not in keys:
            raise ValueError(f"{prefix}{shown(key)} is unknown; allowed are {', '.join(keys)}")
    for key in keys or ():
        if key not in value:
            raise ValueError(f"{prefix}{key} is missing")
    return value


def _written(links: Mapping[str, Link]) -> dict[str, dict]:
    return {name: asdict(link) | {"points": [*map(list, link.points)]} for name, link in links.items()}


def _links(where: str, value: object, names: tuple[str, ...]) -> dict[str, Link]:
    return {name: _link(f"{where}: {name}", words) for name, words in _mapping(where, value, names).items()}


def _link(where: str, value: object) -> Link:
    words = dict(_mapping(where, {"points": []} | value if isinstance(value, dict) else value))
    points, place = words.pop("points", None), f"{where}: points"
    if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
        raise ValueError(f"{place}: {shown(points)} is not a list of [bytes, seconds]")
    points = tuple(tuple(_number(place, number) for number in point) for point in points)
    sizes = [0.0, *(size for size, _ in points)]
    if any(size <= before for before, size in zip(sizes, sizes[1:])):
        raise ValueError(f"{place}: {shown(sizes[1:])} bytes do not ascend from above 0")
    names = ("bytes_per_s", "latency_s")
    numbers = {key: _number(f"{where}: {key}", number) for key, number in _mapping(where, words, names).items()}
    if not numbers["bytes_per_s"]:
        raise ValueError(f"{where}: bytes_per_s: a link of 0 bytes per second")
    return Link(**numbers, points=points)


def _numbers(where: str, value: object, cls: type) -> dict[str, float]:
    names = tuple(each.name for each in fields(cls))
    return {key: _number(f"{where}: {key}", number) for key, number in _mapping(where, value, names).items()}


def _number(where: str, value: object) -> float:
    if isinstance(value, str):  # YAML takes 1e-5, without a point, for text
        with suppress(ValueError):
            value = float(value)
    # bool is a kind of int, and NaN is neither at least 0 nor at most anything.
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max:
        return float(value)
    raise ValueError(f"{where}: {shown(value)} is not a number >= 0")
