# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp bench codec`: times of encode, decode and sum on one device."""

import argparse
import os
from types import ModuleType

import torch

from ..bench import peers, plot
from ..bench.circumstances import circumstances
from ..bench.codecs import CodecTiming, measure
from ..launcher import output
from ..wire import backends
from ..wire.codec import Codec
from . import checks
from .arguments.bench_codec import CODECS, SHAPE

COLUMNS = {
    "op": ("op", ""),
    "codec": ("codec", ""),
    "backend": ("backend", ""),
    "ranks": ("ranks", "d"),
    "bytes_moved": ("bytes moved", ",d"),
    "median_ms": ("median ms", ".4f"),
    "p20_ms": ("p20", ".4f"),
    "p80_ms": ("p80", ".4f"),
    "gb_per_s": ("GB/s", ".2f"),
    "times_copy": ("x copy", ".2f"),
    "share_of_copy": ("of copy's GB/s", ".1%"),
}
ON_GPU = {"times_empty": ("x empty", ".1f")}


def check(args: argparse.Namespace) -> CodecTiming:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("bench codec runs in one process: start it without torchrun or srun")
    checks.at_least_one(args, "threads", "runs")
    checks.check_written(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: torch {torch.__version__} sees no CUDA device here")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ranks = args.ranks or ([2, 8] if device.type == "cuda" else [2, 4])
    if min(ranks) < 1:
        raise ValueError(f"--tp {min(ranks)}: at least one is needed")
    return CodecTiming(
        codecs={name: Codec.parse(name) for name in args.codec or CODECS},
        shapes=[checks.shape(text, SHAPE) for text in args.shape or [SHAPE]],
        dtype=args.dtype,
        ranks=sorted(set(ranks)),
        backends=_backends(args.backend, device),
        device=device,
        repeats=args.runs,
        peers=peers.load(device) if args.peers else {},
    )


def _backends(names: list[str] | None, device: torch.device) -> dict[str, ModuleType]:
    known = backends.available(device.type)
    for name in names or []:
        if name not in known:
            raise ValueError(f"--backend {name}: allowed on {device} are {', '.join(known)}")
    return {name: known[name] for name in names or known}


def run(args: argparse.Namespace) -> None:
    setting = check(args)
    if setting.device.type == "cpu":
        torch.set_num_threads(args.threads)
    about = circumstances(setting.device)
    device = about["device"]
    resolved = {
        "codec": list(setting.codecs),
        "shape": ["x".join(map(str, shape)) for shape in setting.shapes],
        "ranks": setting.ranks,
        "backend": list(setting.backends),
        "device": device,
    }
    rows = []
    for shape in setting.shapes:
        rows += (made := measure(setting, shape))
        columns = COLUMNS | (ON_GPU if setting.device.type == "cuda" else {})
        output.show(f"bench codec: {list(shape)} {setting.dtype}, {device}", columns, made)
        # After every shape, so that a run that is cut short leaves what it has measured.
        output.write_json(args.json, vars(args) | resolved, rows)
        output.write_csv(args.csv, [row | about for row in rows])
    if args.figure:
        plot.draw_codecs([row | about for row in rows], args.figure)
