# SPDX-License-Identifier: Apache-2.0
"""Broken kernels, each of which the checks must find: do they?

A mutant is a change of a kernel's source or of its PTX, and the case that has to fail with it. Without the change the
case must pass. Prints how the mutant was found, and fails if it was not.

Usage: python tests/kernels/ptx/mutants.py [NAME]...       without names all of them
"""

import argparse
import importlib
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from checks import FAR, Case
from device import Device
from memory import Fault
from triton.compiler.errors import CompilationError
from triton.runtime.jit import JITFunction

ROOMS = ["blocks", "decode_sum", "decode_sum_encode", "encode", "numbers", "planes", "scales", "slices"]
NOT_FOUND = "NOT FOUND"
PARTLY_FILLED = (2, 4096 + 33)  # rows that end inside of a tile, and inside of a block


@dataclass(frozen=True)
class Mutant:
    """Either of `ptx` and `source`: a pattern and what it becomes.

    each: every place of the pattern by itself, so that one alone must be found.
    """

    case: Case
    ptx: tuple[str, str] | None = None
    source: tuple[str, str] | None = None
    each: bool = False


MUTANTS = {
    "stores without their masks": Mutant(
        Case("encode", "mxfp4", PARTLY_FILLED, "bf16"), ptx=(r"@!?%p\d+ (st\.global)", r"\1")
    ),
    "loads without their masks": Mutant(
        Case("encode", "mxfp4", PARTLY_FILLED, "bf16"), ptx=(r"@!?%p\d+ (ld\.global)", r"\1")
    ),
    "sums rounded towards zero": Mutant(
        Case("decode_sum", "mxfp4", (3, 1024), "bf16"), ptx=(r"cvt\.rn\.bf16", "cvt.rz.bf16")
    ),
    "scales rounded towards zero": Mutant(
        Case("encode", "int6:128:fp16:asym", (3, 1024), "bf16"),
        source=(r"bits \+ 0x7FFF \+ \(\(bits >> 16\) & 1\)", "bits"),
    ),
    "reciprocals as they are approximated": Mutant(
        Case("encode", "int8:32:fp16", (3, 1024), "bf16"),
        source=(r"tl\.fma\(tl\.fma\(minus, near, 1\.0\), near, near\)", "near"),
    ),
    "subnormals that are not flushed": Mutant(
        Case("encode", "mxfp4", (3, 1024), "bf16"), ptx=(r"mul\.ftz\.f32", "mul.f32")
    ),
    "small elements rounded as normal ones": Mutant(
        Case("encode", "mxfp4", (3, 1024), "bf16"), ptx=(r"max\.f16x2 power, power, smallest;", "")
    ),
    "codes above the largest one": Mutant(
        Case("encode", "nvfp4", (3, 1024), "bf16"), ptx=(r"min\.f16x2 low, low, [^;]*;", "")
    ),
    "blocks of NaN with codes": Mutant(
        Case("encode", "int4:32:fp16", (3, 1024), "bf16"), source=(r"groups &= keep", "groups &= -1")
    ),
    "blocks of NaN with pairs of codes": Mutant(
        Case("encode", "mxfp4", (3, 1024), "bf16"),
        source=(r"tl\.where\(bad, 0, (LARGEST|SIGNS)\)", r"tl.where(bad, \1, \1)"),
    ),
    "input addresses of 32 bits": Mutant(
        FAR[0], source=(r"first = tl\.cast\(tile, tl\.int64\) \* TILE", "first = tile * TILE")
    ),
    "output addresses of 32 bits": Mutant(
        FAR[0], source=(r"first_row \* hidden \+ row \* columns \+ first", r"(\g<0>).to(tl.int32)")
    ),
    "a slice that starts at the first row": Mutant(
        Case("slices", "mxfp4", (3, 1024), "bf16"), source=(r"first_row \* x_stride", "0 * x_stride")
    ),
    "hidden = 1 as a constant": Mutant(
        Case("decode_sum", "mxfp4", (3, 1), "bf16"),
        source=(r"tl\.cast\(hidden, tl\.int64\)", "hidden.to(tl.int64)"),
    ),
    "no barriers": Mutant(Case("decode_sum", "mxfp4", (3, 1024), "bf16"), ptx=(r"bar\.sync[^;]*;", ";")),
    "one barrier less": Mutant(Case("encode", "mxfp4", (1, 4096), "bf16"), ptx=(r"bar\.sync[^;]*;", ";"), each=True),
}


def functions() -> list[JITFunction]:
    rooms = [importlib.import_module(f"megatron_comp.kernels.{name}") for name in ROOMS]
    return [value for room in rooms for value in vars(room).values() if isinstance(value, JITFunction)]


def forget_compiled() -> None:
    for function in functions():
        function.hash = None  # it holds the sources of all that a function calls
        function.device_caches.clear()


def change_source(pattern: str, new: str) -> Callable:
    """Changes all functions that have the pattern, and returns what puts them back."""
    changed = [(function, function.src) for function in functions() if re.search(pattern, function.src)]
    if not changed:
        raise LookupError(f"no kernel has {pattern!r}: the mutant needs the present source")
    for function, source in changed:
        function._unsafe_update_src(re.sub(pattern, new, source))
    return lambda: [function._unsafe_update_src(source) for function, source in changed]


def edit(pattern: str, new: str, number: int | None, counts: list) -> Callable:
    """A change of PTX: all places, or only the one of that number. What it finds is added to `counts`."""

    def change(ptx):
        places = [*re.finditer(pattern, ptx)]
        if not places:
            raise LookupError(f"no PTX has {pattern!r}: the mutant needs another case")
        counts.append(len(places))
        for place in reversed(places if number is None else [places[number]]):
            ptx = ptx[: place.start()] + place.expand(new) + ptx[place.end() :]
        return ptx

    return change


def found(device: Device, case: Case) -> str | None:
    """How the case fails; None if it passes."""
    forget_compiled()
    try:
        case.check(device)
    except (Fault, AssertionError, CompilationError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def try_mutant(device: Device, mutant: Mutant) -> list[str | None]:
    """How each change was found."""
    device.edit = lambda ptx: ptx
    if broken := found(device, mutant.case):
        raise ValueError(f"{mutant.case} fails without any change: {broken}")
    if mutant.source:
        restore = change_source(*mutant.source)
        result = found(device, mutant.case)
        restore()
        return [result]
    counts, results, number = [1], [], 0
    while number < (counts[-1] if mutant.each else 1):
        device.edit = edit(*mutant.ptx, number if mutant.each else None, counts)
        results.append(found(device, mutant.case))
        number += 1
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", nargs="*", help=f"which ones: {', '.join(MUTANTS)} (default: all)")
    args = parser.parse_args()
    if unknown := {*args.name} - {*MUTANTS}:
        parser.error(f"no mutant is called {', '.join(sorted(unknown))}; there are {', '.join(MUTANTS)}")
    torch.set_num_threads(1)
    alive = 0
    with tempfile.TemporaryDirectory() as folder:
        device = Device(Path(folder))
        for name in args.name or MUTANTS:
            for number, how in enumerate(try_mutant(device, MUTANTS[name])):
                alive += how is None
                print(f"{name} {number}: {how or NOT_FOUND}", flush=True)
    sys.exit(alive > 0)


if __name__ == "__main__":
    main()
