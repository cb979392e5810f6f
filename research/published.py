# SPDX-License-Identifier: Apache-2.0
"""The cost model of `megatron-comp plan` beside published measurements.

    python -m research.published [--json FILE]

Three sources. Nothing of ours was measured on their machines, and only what is said here was fitted to their figures.

1. Time to first token, arXiv 2411.09510: FP4 in blocks of 32 (4.25 bits), gather_sum, in eager PyTorch. Its plain sum
   is taken to be an all-gather in 16 bits: a ring moves too few bytes for what compression gained. Fitted, to the rows
   marked so: compute's share of the peak, the time to start a layer's kernels, the rate of the L4s' PCIe, and a codec's
   fixed time and share of the memory's rate. NVLink is at 80 % of its peak.
2. All-reduce kernels, QuickReduce on MI300X and FlashInfer on H200: latency and rate of a line through the stock times
   (those rows are fitted); compressed ones are predicted by two_step on that line, codecs in one fused kernel.
3. Speed-ups by INT4 of arXiv 2412.04964, Llama-3-70B on 4 GPUs, 8 prompts of 1024 tokens: by the assumptions that
   `plan` makes for everybody, of which the share of PCIe that is reached was fitted to the L40's row.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass

from megatron_comp.bench.fit import line
from megatron_comp.cli import carry_out
from megatron_comp.launcher import output
from megatron_comp.policy import CompressionPolicy
from megatron_comp.predict.hardware import GPUS, WIRES, Interconnect, Shares, assumed_calibration
from megatron_comp.predict.models import MODELS
from megatron_comp.predict.times import Job, compute_seconds, sums
from megatron_comp.wire.calibration import Calibration, Link
from megatron_comp.wire.codec import Codec
from megatron_comp.wire.cost import sum_seconds
from megatron_comp.wire.traffic import ring_bytes

EAGER = Shares(compute=0.52, codec=0.18, codec_call_us=193, layer_us=1000)
L4_PCIE = Interconnect(4.6, 5, "between L4s, of PCIe 4.0's 32", reached=1.0)

COLUMNS = {
    "source": ("source", ""),
    "case": ("case", ""),
    "figure": ("figure", ""),
    "use": ("used", ""),
    "published": ("published", ".4g"),
    "predicted": ("predicted", ".4g"),
    "error_pct": ("error, %", "+.0f"),
    "note": ("note", ""),
}


@dataclass(frozen=True)
class TimeToFirstToken:
    """A row of arXiv 2411.09510, seconds."""

    model: str
    gpu: str
    tp: int
    batch: int
    tokens: int
    plain: float
    compressed: float
    fitted: bool
    reason: str = ""


PAPER = [
    TimeToFirstToken("llama-2-70b", "L4", 8, 2, 64, 0.58, 0.32, True),
    TimeToFirstToken("llama-2-70b", "L4", 8, 2, 128, 1.07, 0.52, False),
    TimeToFirstToken("llama-2-13b", "L4", 4, 8, 128, 0.67, 0.33, True),
    TimeToFirstToken("llama-2-13b", "L4", 4, 8, 256, 1.37, 0.70, False),
    TimeToFirstToken(
        *("llama-2-7b", "L4", 2, 16, 128, 0.39, 0.45, False),
        "compression adds 0.9 ms per sum here, by the model's codec it saves 1.4: the 13B's rows speak for the model",
    ),
    TimeToFirstToken("llama-2-70b", "A100", 4, 2, 128, 0.09, 0.15, True),
    TimeToFirstToken("llama-2-70b", "A100", 4, 2, 256, 0.13, 0.19, False),
]


def _paper_rows() -> list[dict]:
    made, codec = [], Codec.parse("mxfp4")
    for row in PAPER:
        job = Job(MODELS[row.model], row.tp, row.batch, row.tokens)
        gpu, wire = GPUS[row.gpu], {"L4": L4_PCIE, "A100": WIRES["nvlink3"]}[row.gpu]
        known = assumed_calibration(gpu, wire, EAGER, [codec], row.tp)
        compute = compute_seconds(job, gpu, EAGER)
        nbytes = job.shape[0] * job.shape[1] * job.itemsize
        calls = 2 * job.model.layers
        plain = compute + calls * known.links["all_gather"].seconds((row.tp - 1) * nbytes)
        compressed = compute + calls * sum_seconds(job.shape, codec, row.tp, "gather_sum", known)
        case = f"{row.model} {row.tp}x{row.gpu} {row.batch}x{row.tokens}"
        use, reason = "fitted" if row.fitted else "held out", row.reason
        for figure, published, predicted in (("plain s", row.plain, plain), ("fp4 s", row.compressed, compressed)):
            made.append(_row("2411.09510", case, figure, use, published, predicted, reason))
        made.append(_row("2411.09510", case, "speed-up", use, row.plain / row.compressed, plain / compressed, reason))
    return made


@dataclass(frozen=True)
class Kernel:
    """Microseconds of one all-reduce of bf16 by size in MiB; compressed: by codec, None where not published."""

    source: str
    gpu: str
    ranks: int
    mib: tuple[float, ...]
    stock: tuple[float, ...]
    compressed: dict[str, tuple[float | None, ...]]
    reason: str = ""


KERNELS = [
    Kernel(
        *("QuickReduce", "MI300X", 2, (16, 64), (376, 1464)),
        {"int6:32:fp16": (174, 651), "int4:32:fp16": (131, 468)},
    ),
    Kernel(
        *("QuickReduce", "MI300X", 8, (1, 16, 64), (26.4, 148, 426)),
        {"int6:32:fp16": (33.6, 106, 372), "int4:32:fp16": (31.9, 82.8, 273)},
        "with 8 GPUs the compressed kernel reaches half of the rate that stock sums do, and starts later",
    ),
    Kernel(
        *("FlashInfer", "H200", 8, (0.5, 2, 8, 32, 128), (20.8, 40.0, 80.6, 198.8, 626.5)),
        {"fp8_e4m3:256:fp32": (15.9, 23.1, 41.4, 149.8, 523.8)},
        "no line holds from 0.5 to 128 MiB; the kernel starts faster than NCCL, and reaches 0.6 of its rate",
    ),
]


def _kernel_rows() -> list[dict]:
    made = []
    for kernel in KERNELS:
        sizes = [round(mib * 2**20) for mib in kernel.mib]
        points = [(ring_bytes(size, kernel.ranks), us * 1e-6) for size, us in zip(sizes, kernel.stock)]
        latency, per_byte = line(points)
        fitted = Interconnect(1 / per_byte / 1e9, 0, "fitted", reached=1.0)
        codecs = [Codec.parse(name) for name in kernel.compressed]
        known = assumed_calibration(GPUS[kernel.gpu], fitted, Shares(codec_call_us=0), codecs, kernel.ranks)
        # A ring's two passes take its latency; so do the two phases.
        links = {name: Link(1 / per_byte, latency / 2) for name in known.links}
        known = Calibration(links, known.codecs, known.margin, known.measured, known.source)
        for size, us, mib, (received, _) in zip(sizes, kernel.stock, kernel.mib, points):
            case = f"{kernel.ranks}x{kernel.gpu} {mib:g} MiB"
            stock = (latency + received * per_byte) * 1e6
            made.append(_row(kernel.source, case, "stock us", "fitted", us, stock, kernel.reason))
            for codec, (name, times) in zip(codecs, kernel.compressed.items()):
                published = times[sizes.index(size)]
                rows = (size // 2 // 8192, 8192)
                predicted = sum_seconds(rows, codec, kernel.ranks, "two_step", known) * 1e6
                made.append(_row(kernel.source, case, f"{name} us", "held out", published, predicted, kernel.reason))
    return made


@dataclass(frozen=True)
class SpeedUp:
    """Of the time to first token by INT4 in arXiv 2412.04964, and the share of sums in the plain time."""

    gpu: str
    wire: str
    speedup: float
    share: float
    reason: str = ""


FLASH = [
    SpeedUp("L40", "pcie4x16", 2.06, 0.65, "its fused kernel costs less than codecs are assumed to"),
    SpeedUp("A100", "nvlink3", 1.19, 0.20, "its share of sums means 85 GB/s a GPU over NVLink; 240 are assumed"),
]


def _flash_rows() -> list[dict]:
    made, codec = [], Codec.parse("flash-int4")
    for row in FLASH:
        job, gpu, shares = Job(MODELS["llama-3.1-70b"], 4, 8, 1024), GPUS[row.gpu], Shares()
        known = assumed_calibration(gpu, WIRES[row.wire], shares, [codec], 4)
        compute = compute_seconds(job, gpu, shares)
        plain = sums(job, CompressionPolicy(), known).seconds
        policy = CompressionPolicy(codec=str(codec), algorithm="two_step", min_bytes=0)
        compressed = sums(job, policy, known).seconds
        case = f"llama-3-70b 4x{row.gpu} 8x1024"
        for figure, published, predicted in (
            ("speed-up", row.speedup, (compute + plain) / (compute + compressed)),
            ("share of sums", row.share, plain / (compute + plain)),
        ):
            use = "fitted" if (row.gpu, figure) == ("L40", "share of sums") else "held out"
            made.append(_row("2412.04964", case, figure, use, published, predicted, row.reason))
    return made


def rows() -> list[dict]:
    return [*_paper_rows(), *_kernel_rows(), *_flash_rows()]


def _row(source, case, figure, use, published, predicted, reason) -> dict:
    error = predicted / published - 1
    return {
        "source": source,
        "case": case,
        "figure": figure,
        "use": use,
        "published": published,
        "predicted": predicted,
        "error_pct": 100 * error,
        "reason": reason if abs(error) > LARGE else "",
    }


LARGE = 0.2


def summary(rows: list[dict]) -> str:
    """The errors of what was not fitted, in one line."""
    held_out = [abs(row["error_pct"]) for row in rows if row["use"] == "held out"]
    median, within = statistics.median(held_out), sum(error <= 100 * LARGE for error in held_out)
    return f"Held out: {len(held_out)} figures, median error {median:.0f} %, {within} within {LARGE:.0%}."


def check(args: argparse.Namespace) -> None:
    output.check_file("--json", args.json)


def run(args: argparse.Namespace) -> None:
    check(args)
    made = rows()
    reasons = list(dict.fromkeys(row["reason"] for row in made if row["reason"]))
    shown = [row | {"note": reasons.index(row["reason"]) + 1 if row["reason"] else ""} for row in made]
    output.show("The cost model beside published measurements", COLUMNS, shown)
    for number, reason in enumerate(reasons, 1):
        print(f"{number}: {reason}")
    print(summary(made))
    output.write_json(args.json, vars(args), made)


def main(argv: list[str] | None = None) -> int:
    """0, or non-zero after one clear line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m research.published", description="Errors of `plan`'s cost model.")
    parser.add_argument("--json", metavar="FILE", help="Write versions and rows there as one JSON object.")
    argv = sys.argv[1:] if argv is None else argv
    return carry_out(lambda: sys.modules[__name__], parser.parse_args(argv), "research.published", argv)


if __name__ == "__main__":
    sys.exit(main())
