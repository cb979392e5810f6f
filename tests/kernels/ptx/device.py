# SPDX-License-Identifier: Apache-2.0
"""A device without a GPU: Triton's own compiler and launcher, and this emulator in place of the GPU.

`Device` puts a stub libcuda under Triton's driver (libcuda.c, built by the machine's C compiler). A kernel is compiled
and launched as for a GPU. The stub hands each launch over, and block.py executes the kernel's PTX on tensors in this
process's memory.

Checked: each access of global memory is aligned and inside of one tensor of the launch; stores go to outputs only; no
two threads store different bytes to one place; no thread loads what another one stores; shared memory has no race. The
caller compares the bytes.
Not checked: what ptxas makes of the PTX, which is not asked (only that it may contract additions), speed, and branches
inside of a block.

A process has one device, for good: Triton's driver is replaced. TRITON_INTERPRET must not be set.
"""

import ctypes
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch
import triton
from block import Blocks
from memory import Global
from program import Program
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

# torch must not look for a GPU through the real libcuda, which would then be the one that Triton's driver finds.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}

STUB = Path(__file__).with_name("libcuda.c")
SUCCESS, ILLEGAL_ADDRESS = 0, 700  # CUresult
TOGETHER = 16  # blocks that are executed at once: their registers should not outgrow a CPU's caches
HANDLER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p)
)


def build_stub(folder: Path) -> Path:
    """libcuda.so.1 in the folder. It is loaded by that name, so the loader takes it for the one that is asked for."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise FileNotFoundError("the stub of libcuda needs a C compiler: cc, gcc or clang on PATH, or CC")
    library = folder / "libcuda.so.1"
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    command = [compiler, "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1", "-o", library, STUB]
    subprocess.run(command, check=True)
    return library


def load_stub(folder: Path, capability: int = 90) -> ctypes.CDLL:
    """From now on Triton compiles for this GPU and launches on the stub, where a launch does nothing."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)  # where Triton's driver looks for what it links to
    library = ctypes.CDLL(str(build_stub(folder)), mode=ctypes.RTLD_GLOBAL)
    driver.set_active(_driver(capability))
    return library


class Device:
    """capability: 90 for sm_90. edit: called with each kernel's PTX, gives what to execute in its place."""

    def __init__(self, folder: Path, capability: int = 90, edit=lambda ptx: ptx) -> None:
        if knobs.runtime.interpret:
            raise ValueError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
        self.edit, self.programs, self.launches = edit, {}, []
        self.memory, self.blocks, self.fault = Global(), None, None
        self._handler = HANDLER(self._launched)  # kept: C has only a pointer to it
        load_stub(folder, capability).set_launch_handler(self._handler)
        knobs.runtime.kernel_load_end_hook.add(self._loaded)
        knobs.runtime.add_stages_inspection_hook = _without_ptxas
        knobs.compilation.disable_line_info = True

    def run(self, call, inputs, outputs, blocks=None) -> list[Program]:
        """Calls `call`, which launches kernels on these CPU tensors, and returns what was launched.

        blocks: of each grid only those, such as [0, -1]. Raises Fault for what a kernel must not do.
        """
        self.memory, self.blocks, self.fault, self.launches = Global(), blocks, None, []
        for kind, tensors in {"input": inputs, "output": outputs}.items():
            for number, tensor in enumerate(tensors):
                name = f"{kind} {number}, {tensor.dtype} {list(tensor.shape)}"
                self.memory.map(name, tensor.data_ptr(), _span(tensor), kind == "output")
        try:
            with np.errstate(all="ignore"):  # infinities and NaN are data here
                call()
        except RuntimeError:
            if not self.fault:
                raise
        if self.fault:
            raise self.fault
        return self.launches

    def _loaded(self, module, function, name, files, hash) -> None:
        """Triton has loaded a kernel: keep its PTX under its handle."""
        ptx, options = (Path(files[f"{name}.{kind}"]).read_text() for kind in ("ptx", "json"))
        self.programs[function] = Program.parse(self.edit(ptx), json.loads(options)["enable_fp_fusion"])

    def _launched(self, function, grid, shared_bytes, parameters) -> int:
        """What the stub calls in place of a launch. An exception must not reach C: it waits in `fault`."""
        try:
            program = self.programs[function]
            arguments = {
                name: int.from_bytes(ctypes.string_at(parameters[i], int(kind[1:]) // 8), "little")
                for i, (kind, name) in enumerate(program.params)
            }
            self.launches.append(program)
            self.memory.begin()
            count = grid[0] * grid[1]
            numbers = [*range(count)] if self.blocks is None else sorted({block % count for block in self.blocks})
            for first in range(0, len(numbers), TOGETHER):
                some = numbers[first : first + TOGETHER]
                Blocks(program, arguments, self.memory, shared_bytes, some, (grid[0], grid[1])).run()
            self.memory.end()
        except Exception as error:
            self.fault = self.fault or error
            return ILLEGAL_ADDRESS
        return SUCCESS


def _without_ptxas(backend=None, stages=None, options=None, language=None, capability=None):
    """Triton's hook into its stages of compilation. The stub takes anything for a kernel's code, so PTX is the last.

    Without arguments it is asked for what tells such kernels from others in the cache, and for a hash of it.
    """
    if stages is None:
        return "without ptxas", "without ptxas"
    stages["cubin"] = lambda ptx, metadata: ptx.encode()


def _driver(capability):
    """Triton's driver for CUDA, but for what it asks torch."""
    from triton.backends.nvidia.driver import CudaDriver  # needs the stub to be there

    class StubDriver(CudaDriver):
        def __init__(self):
            torch._C._cuda_getCurrentRawStream = lambda device: 0  # which torch without CUDA does not have
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

    return StubDriver()


def _span(tensor: torch.Tensor) -> np.ndarray:
    """uint8: the tensor's memory from its first to its last byte, with what lies between its rows."""
    length = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1
    return torch.as_strided(tensor, (length,), (1,)).view(torch.uint8).numpy()
