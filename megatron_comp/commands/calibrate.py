# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp calibrate`: a file of what this group's link and codecs cost."""

import argparse
import datetime
import socket
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from ..bench import fit
from ..bench.calibration import Scope, Timings, measure
from ..launcher import output
from ..policy import CompressionPolicy
from ..wire.calibration import Calibration, Link, default_path
from ..wire.codec import Codec
from ..wire.cost import sum_seconds
from ..wire.topology import Islands, connect
from . import checks, setup
from .arguments.calibrate import CODECS

LINK_COLUMNS = {
    "collective": ("collective", ""),
    "smallest_us": ("smallest size, us", ".1f"),
    "largest_ms": ("largest, ms", ".2f"),
    "mbit_per_s": ("Mbit/s beyond", ".0f"),
}
CODEC_COLUMNS = {
    "codec": ("codec", ""),
    "encode_ns_per_value": ("encode, ns/value", ".3f"),
    "decode_ns_per_value": ("decode, ns/value", ".3f"),
    "compressed_sizes": ("`auto` compresses, bytes", ""),
    "algorithm": ("largest message by", ""),
    "predicted_ms": ("predicted ms", ".2f"),
    "measured_ms": ("measured ms", ".2f"),
    "stock_ms": ("stock ms", ".2f"),
    "speedup": ("speed-up", ".2f"),
}


def check(args: argparse.Namespace) -> Scope:
    if args.tp < 2:
        raise ValueError(f"--tp {args.tp}: a link needs at least two")
    checks.at_least_one(args, "hidden", "runs")
    tokens = sorted(set(args.tokens or (1, 8, 64, 512)))
    if len(tokens) < 2 or tokens[0] < 1:
        raise ValueError(f"--tokens {' '.join(map(str, tokens))}: two different sizes above 0 are needed at least")
    if args.cuda_graphs and not torch.cuda.is_available():
        raise ValueError("--cuda-graphs needs a GPU: without one nothing can be captured")
    checks.check_timeout(args)
    checks.check_written(args, "out")
    named = [*args.codec, *(str(codec) for file in args.policy for codec in CompressionPolicy.from_file(file).codecs())]
    codecs = {name: Codec.parse(name) for name in named or CODECS}
    shapes = [(count, args.hidden) for count in tokens]
    return Scope(codecs, shapes, setup.dtype_name(args), args.runs, graphs=args.cuda_graphs)


def run(args: argparse.Namespace) -> None:
    from ..inference.model import destroy_parallel, init_parallel

    setting = check(args)
    init_parallel(args.tp, args.timeout)
    hosts = [""] * args.tp
    dist.all_gather_object(hosts, socket.gethostname())
    if (islands := Islands.of_names(hosts)).have_two_levels:
        setting = replace(setting, topology=connect({None: islands})[None])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timings = measure(setting, device)
    calibration = fit.calibration(setting, timings, _about(args, setting, device, len(set(hosts))))
    agreed = [calibration]
    dist.broadcast_object_list(agreed)  # all ranks go by one and the same
    (calibration,) = agreed
    if output.is_first_rank():
        about = calibration.measured
        group = about["ranks"], about["hosts"], about["backend"], about["device"]
        path = args.out or default_path(*group, args.cuda_graphs)
        calibration.write(path)
        _show(setting, timings, calibration, args)
        print(f"calibration: {path}")
    destroy_parallel()


def _about(args: argparse.Namespace, setting: Scope, device: torch.device, hosts: int) -> dict[str, object]:
    return {
        "ranks": args.tp,
        "hosts": hosts,
        "backend": dist.get_backend(),
        "device": device.type,
        "device_name": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": setting.dtype,
        "cuda_graphs": setting.graphs,
        "date": datetime.date.today().isoformat(),
        "versions": output.versions(),
    }


def _show(setting, timings, calibration, args) -> None:
    links = [
        {
            "collective": name,
            "smallest_us": link.points[0][1] * 1e6,
            "largest_ms": link.points[-1][1] * 1e3,
            "mbit_per_s": link.bytes_per_s * 8e-6,
        }
        for name, link in _named_links(calibration).items()
    ]
    codecs = [_codec_row(name, codec, setting, timings, calibration) for name, codec in setting.codecs.items()]
    about = calibration.measured
    title = f"calibrate: {about['ranks']} ranks, {about['hosts']} machine(s), {about['backend']}, {about['dtype']}"
    output.show(title, LINK_COLUMNS, links)
    largest = setting.nbytes(setting.shapes[-1])
    shown = [row | {"compressed_sizes": _sizes(row["compressed_sizes"])} for row in codecs]
    output.show(f"codecs; the largest message has {largest:,d} bytes", CODEC_COLUMNS, shown)
    output.write_json(args.json, vars(args), [*links, *codecs])
    print(f"Chunks hide {calibration.hidden:.0%} of codec or wire, whichever is shorter.")
    print(_advice(codecs, calibration.margin))


def _named_links(calibration: Calibration) -> dict[str, Link]:
    levels = {"inside": calibration.inside, "across": calibration.across}
    named = {f"{name}, {level}": link for level, links in levels.items() for name, link in links.items()}
    return {**calibration.links, **named}


def _codec_row(name, codec, setting, timings, calibration) -> dict:
    shape, ranks, cost = setting.shapes[-1], calibration.ranks, calibration.cost(codec)
    times = {way: timings.median("sum", shape, name, way) for way in setting.ways}
    algorithm = min(times, key=times.get)
    stock = timings.median("all_reduce", shape)
    gains = {each: _speedup(timings, each, name, setting.ways) for each in setting.shapes}
    best = max(gains, key=gains.get)
    return {
        "codec": name,
        "encode_ns_per_value": cost.encode_s_per_value * 1e9,
        "decode_ns_per_value": cost.decode_s_per_value * 1e9,
        "compressed_sizes": fit.compressed_sizes(codec, setting.itemsize, calibration, shape[1], setting.islands),
        "algorithm": algorithm,
        "predicted_ms": sum_seconds(shape, codec, ranks, algorithm, calibration, setting.islands) * 1e3,
        "measured_ms": times[algorithm] * 1e3,
        "stock_ms": stock * 1e3,
        "speedup": stock / times[algorithm],
        "best_speedup": gains[best],
        "best_bytes": setting.nbytes(best),
    }


def _speedup(timings: Timings, shape: tuple[int, int], name: str, ways: Sequence[str]) -> float:
    """Of the fastest algorithm over the stock all-reduce, as measured."""
    return timings.median("all_reduce", shape) / min(timings.median("sum", shape, name, way) for way in ways)


def _sizes(ranges: list[tuple[int, int | None]]) -> str:
    """`1,024 to 2,048, 16,384 and more`."""
    said = [f"{first:,d} and more" if last is None else f"{first:,d} to {last:,d}" for first, last in ranges]
    return ", ".join(said) or "none"


def _advice(rows: list[dict], margin: float) -> str:
    """One line that says whether to compress. Only a codec that was faster in a measurement is ever advised."""
    gained = [row for row in rows if row["best_speedup"] > 1]
    if not gained:
        return "Leave compression off here: no codec was faster than the stock all-reduce at any measured size."
    paying = [row for row in gained if row["compressed_sizes"]]
    if not paying:
        return (
            "Leave compression off here: no codec is predicted to beat the stock all-reduce by the margin of "
            f"{margin:.0%} at any size."
        )
    best = max(paying, key=lambda row: row["best_speedup"])
    return (
        f"Compress: {best['codec']} was {best['best_speedup']:.2f} times as fast as the stock all-reduce at "
        f"{best['best_bytes']:,d} bytes. `min_bytes: auto` compresses messages of {_sizes(best['compressed_sizes'])} "
        "bytes in this codec, and leaves the others uncompressed."
    )
