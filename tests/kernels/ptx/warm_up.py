# SPDX-License-Identifier: Apache-2.0
"""Does `wire/backends.warm_up` leave nothing to compile, and what does it say where nothing can be compiled?

Usage: python tests/kernels/ptx/warm_up.py                     a device without a GPU (device.py)
       python tests/kernels/ptx/warm_up.py --without-compiler  Triton itself, with a C compiler that is not there

Prints `<kernels> kernels compiled before, <kernels> in sums` for each case, without kernels of earlier cases, or the
error. Kernels are compiled and loaded, not executed.
"""

import itertools
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from device import Device, build_stub

from megatron_comp.wire import backends, gpu
from megatron_comp.wire.formats import Format
from megatron_comp.wire.message import layout

CPU = torch.device("cpu")
RANKS, HIDDEN = 3, 64
ALGORITHMS = ("gather_sum", "two_step", "reduce_scatter")
CODECS = [("mxfp4", "mxfp4"), ("int4:32:fp16", "int8:32:fp16"), ("nvfp4", "nvfp4")]


def sum_of(algorithm, first, second, dtype, rows):
    """The launches of a sum: `rows` of each rank's slice."""
    counts = tuple(rows)
    x = torch.zeros(sum(rows), HIDDEN, dtype=dtype)
    messages = torch.zeros(RANKS, layout(first, rows[0], HIDDEN).nbytes, dtype=torch.uint8)
    if algorithm == "gather_sum":
        gpu.encode(x[: rows[0]], first, messages[0])
    else:
        gpu.encode_slices(x, first, counts, messages.view(-1))
    if algorithm == "two_step":
        slots = torch.zeros(RANKS, layout(second, rows[0], HIDDEN).nbytes, dtype=torch.uint8)
        gpu.decode_sum_encode(messages, (rows[0], HIDDEN), first, second, slots[0])
        gpu.decode_slices(slots, second, counts, x)
    else:
        gpu.decode_sum(messages, first, x[: rows[0]])


def sum_by_level(first, second, dtype, rows):
    """The launches of a hierarchical sum over two islands, `gather_sum` between them: `rows` of each rank's share."""
    slots = torch.zeros(2 * len(rows), layout(first, rows[0], HIDDEN).nbytes, dtype=torch.uint8)
    gpu.sum_encode(torch.zeros(len(rows), rows[0], HIDDEN, dtype=dtype), first, rows[:1], slots[0])
    gpu.decode_slices(slots, first, rows, torch.zeros(sum(rows), HIDDEN, dtype=dtype), 2)


def count_compiled(device: Device) -> None:
    for algorithm, pair in itertools.product(ALGORITHMS, CODECS):
        _count(device, f"{algorithm} {'>'.join(pair)}", pair, RANKS, algorithm, partial(sum_of, algorithm))
    _count(device, "hierarchical mxfp4", CODECS[0], 2, "gather_sum", sum_by_level, mates=RANKS, shares=RANKS)


def _count(device, name, pair, ranks, algorithm, launches, **level) -> None:
    first, second = map(Format.parse, pair)
    known = len(device.programs)
    kind = backends.SumKind(first, second, torch.bfloat16, HIDDEN, ranks, algorithm, **level)
    device.run(lambda: backends.warm_up(kind, CPU), [], [], blocks=[])
    warm = len(device.programs)
    for rows in ((1, 1, 1), (7, 6, 6), (40, 40, 40)):
        device.run(lambda rows=rows: launches(first, second, torch.bfloat16, rows), [], [], blocks=[])
    later = len(device.programs) - warm
    print(f"{name}: {warm - known} kernels compiled before, {later} in sums")


def without_compiler(folder: Path) -> None:
    """Triton looks for its driver at the first launch, and compiles a part of it."""
    from triton.backends.nvidia.driver import CudaDriver

    build_stub(folder)
    os.environ |= {"TRITON_LIBCUDA_PATH": str(folder), "CC": "/nonexistent", "TRITON_CACHE_DIR": str(folder / "cache")}
    CudaDriver.is_active = staticmethod(lambda: True)
    mxfp4 = Format.parse("mxfp4")
    try:
        backends.warm_up(backends.SumKind(mxfp4, mxfp4, torch.bfloat16, HIDDEN, RANKS, "gather_sum"), CPU)
    except RuntimeError as error:
        print(error)


if __name__ == "__main__":
    backends.choose_backend = lambda device_type: gpu
    with tempfile.TemporaryDirectory() as name:
        if "--without-compiler" in sys.argv[1:]:
            without_compiler(Path(name))
        else:
            count_compiled(Device(Path(name)))
