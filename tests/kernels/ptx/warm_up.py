# SPDX-License-Identifier: Apache-2.0
"""Does `wire/backends.warm_up` leave nothing to compile, and what does it say where nothing can be compiled?

Usage: python tests/kernels/ptx/warm_up.py                     a device without a GPU (device.py)
       python tests/kernels/ptx/warm_up.py --without-compiler  Triton itself, with a C compiler that is not there

Prints `<kernels> kernels compiled before, <kernels> in sums` for each case, without kernels of earlier cases, or the
error. Kernels are compiled and loaded, not executed.
"""

import os
import sys
import tempfile
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


def count_compiled(device: Device) -> None:
    for algorithm in ALGORITHMS:
        for pair in CODECS:
            first, second = map(Format.parse, pair)
            known = len(device.programs)
            arguments = (first, second, torch.bfloat16, HIDDEN, RANKS, algorithm, CPU)
            device.run(lambda arguments=arguments: backends.warm_up(*arguments), [], [], blocks=[])
            warm = len(device.programs)
            for rows in ((1, 1, 1), (7, 6, 6), (40, 40, 40)):
                arguments = (algorithm, first, second, torch.bfloat16, rows)
                device.run(lambda arguments=arguments: sum_of(*arguments), [], [], blocks=[])
            later = len(device.programs) - warm
            print(f"{algorithm} {'>'.join(pair)}: {warm - known} kernels compiled before, {later} in sums")


def without_compiler(folder: Path) -> None:
    """Triton looks for its driver at the first launch, and compiles a part of it."""
    from triton.backends.nvidia.driver import CudaDriver

    build_stub(folder)
    os.environ |= {"TRITON_LIBCUDA_PATH": str(folder), "CC": "/nonexistent", "TRITON_CACHE_DIR": str(folder / "cache")}
    CudaDriver.is_active = staticmethod(lambda: True)
    mxfp4 = Format.parse("mxfp4")
    try:
        backends.warm_up(mxfp4, mxfp4, torch.bfloat16, HIDDEN, RANKS, "gather_sum", CPU)
    except RuntimeError as error:
        print(error)


if __name__ == "__main__":
    backends.choose_backend = lambda device_type: gpu
    with tempfile.TemporaryDirectory() as name:
        if "--without-compiler" in sys.argv[1:]:
            without_compiler(Path(name))
        else:
            count_compiled(Device(Path(name)))
