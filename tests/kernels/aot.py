# SPDX-License-Identifier: Apache-2.0
"""Compiles the kernels for GPUs that need not be there, and holds what the compiler made of them to its budgets.

The launches are those of `megatron_comp/wire/gpu.py` itself, with tensors of whole, aligned blocks: only the driver is
replaced, so that each launch ends after compilation. A process compiles with the Triton that it finds, so this is a
script. TRITON_INTERPRET must not be set.

Usage: python tests/kernels/aot.py [--target sm_90]... [--codec mxfp4]... [--op encode]... [--ranks 8]... [--csv FILE]

Without options all there is, which takes some minutes; a folder with another Triton goes into PYTHONPATH. Prints what
breaks a budget (budgets.py), a line each, and then fails. Budgets hold for up to 8 ranks, or 4 of `decode_sum_encode`.
"""

import argparse
import collections
import csv
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import budgets
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from megatron_comp.kernels.format import TILE
from megatron_comp.wire import gpu, message
from megatron_comp.wire.formats import PRESETS, Format

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 89, 90, 100, 120)},
    **{arch: GPUTarget("hip", arch, 64) for arch in ("gfx942", "gfx950")},
}
CODECS = [*PRESETS, "int8:32:fp16", "int4:32:fp16:hadamard", "int5:32:fp16:hadamard", "lloyd4:32:e5m3:hadamard"]
RANKS = {"encode": [1], "decode_sum": [8], "decode_sum_encode": [4]}
SHAPE = (16, 4096)

COLUMNS = ["op", "codec", "ranks", "target", "triton", "registers", "spills", "shared_bytes"]
COLUMNS += ["code_bytes", "instructions", "instructions_per_value", "integer_per_value", "barriers"]

# NVIDIA's instructions of the pipe for integers, logic, comparisons, minima and maxima, which on sm_90 is half as wide
# as what is issued.
INTEGER_PIPE = re.compile(
    r"BMSK|F2FP|FCHK|FMNMX|FSEL|FSETP?|HMNMX2|HSET2|HSETP2|I2IP|IABS|IADD3?|IMNMX|ISETP|LEA|LOP3?|MOV|P2R|PLOP3|PRMT"
    r"|R2P|SEL|SGXT|SHF|VIADD|VIADDMNMX|VIMNMX3?"
)


class NoDriver:
    """What a launch asks of the active driver before it has a kernel to run."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target)  # kernels are kept by device

    def get_current_stream(self, device):
        return 0


def compile_launch(op: str, codec: str, ranks: int, target: GPUTarget):
    """The compiled kernel of one launch."""
    fmt = Format.parse(codec)
    nbytes = message.layout(fmt, *SHAPE).nbytes
    x, out = torch.empty(SHAPE, dtype=torch.bfloat16), torch.empty(nbytes, dtype=torch.uint8)
    messages = torch.empty(ranks, nbytes, dtype=torch.uint8)
    driver.set_active(NoDriver(target))
    compiled, run = [], JITFunction.run
    JITFunction.run = lambda self, *args, **options: compiled.append(run(self, *args, **{**options, "warmup": True}))
    try:
        if op == "encode":
            gpu.encode(x, fmt, out)
        elif op == "decode_sum":
            gpu.decode_sum(messages, fmt, x)
        else:
            gpu.decode_sum_encode(messages, SHAPE, fmt, fmt, out)
    finally:
        JITFunction.run = run
    (kernel,) = compiled
    return kernel


def measure(op: str, codec: str, ranks: int, target: str, disassemble: bool = False) -> dict:
    """One row of the table and more: `accesses`, how many instructions load and store how many bytes of device memory.

    Spills are instructions that touch local memory (NVIDIA), or registers that were spilled (AMD). Instructions for
    NVIDIA are counted only if asked for: a disassembly takes longer than all else once a kernel is compiled.
    """
    kernel = compile_launch(op, codec, ranks, TARGETS[target])
    amd = TARGETS[target].backend == "hip"
    found = _measure_amd(kernel.asm["amdgcn"]) if amd else _measure_nvidia(kernel, disassemble)
    threads = kernel.metadata.num_warps * TARGETS[target].warp_size
    return {
        "op": op,
        "codec": codec,
        "ranks": ranks,
        "target": target,
        "triton": triton.__version__,
        "shared_bytes": kernel.metadata.shared,
        "threads": threads,
        "instructions_per_value": round(found["instructions"] * threads / TILE, 1) if disassemble else None,
        "integer_per_value": round(found["integer"] * threads / TILE, 1) if disassemble and found["integer"] else None,
        "long_divisions": len(re.findall(r"\b[su](?:div|rem) i64 [^,]+, %", kernel.asm["llir"])),
        **found,
    }


def _measure_nvidia(kernel, disassemble: bool) -> dict:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()

        def dump(option):
            return subprocess.run([tool, option, cubin.name], check=True, capture_output=True, text=True).stdout

        usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump("-res-usage"))}
        # A stack without spills exists, spills without a stack do not.
        disassemble = disassemble or usage["STACK"] + usage["LOCAL"] > 0
        sass = dump("-sass") if disassemble else ""
    # As in "/*0120*/  @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;".
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    accesses = collections.Counter()
    for way, count, bits in re.findall(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bsuf](\d+)\b", kernel.asm["ptx"]):
        accesses[f"{'load' if way == 'ld' else 'store'} {int(count or 1) * int(bits) // 8}"] += 1
    return {
        "registers": usage["REG"],
        "spills": sum(name.startswith(("LDL", "STL")) for name in names),
        "instructions": sum(name != "NOP" for name in names),
        "integer": sum(INTEGER_PIPE.fullmatch(name.partition(".")[0]) is not None for name in names),
        "barriers": sum(name.startswith("BAR") for name in names),
        "code_bytes": 16 * len(names),
        "accesses": dict(accesses),
    }


def _measure_amd(text: str) -> dict:
    def number(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", text).group(1))

    names = re.findall(r"^\t([a-z]+_\w+)", text, re.MULTILINE)
    size = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
    accesses = collections.Counter()
    for name in names:
        if found := re.match(r"(?:global|buffer)_(load|store)_[us]?(byte|short|dwordx?\d?)", name):
            accesses[f"{found[1]} {size[found[2]]}"] += 1
    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "instructions": len(names),
        "integer": None,
        "barriers": names.count("s_barrier"),
        "code_bytes": int(re.search(r"codeLenInByte = (\d+)", text).group(1)),
        "accesses": dict(accesses),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--codec", action="append", help=f"default: {', '.join(CODECS)}")
    parser.add_argument("--op", action="append", choices=RANKS, help="default: all")
    parser.add_argument(
        "--ranks", action="append", type=int, help="of decode_sum and decode_sum_encode (default: 8, 4)"
    )
    parser.add_argument("--csv", type=Path, help="append the table to this file; a new one begins with its header")
    args = parser.parse_args()
    rows = [
        measure(op, codec, ranks, target, disassemble=args.csv is not None)
        for target in args.target or TARGETS
        for codec in args.codec or CODECS
        for op in args.op or RANKS
        for ranks in (op != "encode" and args.ranks) or RANKS[op]
    ]
    if args.csv:
        new = not args.csv.exists()
        with args.csv.open("a", newline="") as file:
            table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            if new:
                table.writeheader()
            table.writerows(rows)
    wrong = [
        f"{row['op']} {row['codec']} {row['ranks']} {row['target']}: {what}"
        for row in rows
        for what in budgets.complaints(row)
    ]
    print(*wrong, f"Triton {triton.__version__}: {len(rows)} kernels, {len(wrong)} complaints", sep="\n")
    sys.exit(len(wrong) > 0)


if __name__ == "__main__":
    main()
