# SPDX-License-Identifier: Apache-2.0
"""The real Python of Transformer Engine on a CPU: what its bindings would compute is done by torch.

The wheel `transformer-engine` holds Python alone, and none of it is changed. Its C++ bindings need CUDA. Here they are
names without a function, and the few places that a linear calls them from are replaced.
Call `prepare` before anything imports `transformer_engine` or `megatron`.
"""

import enum
import functools
import os
import subprocess
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock, patch

import torch
import torch.distributed as dist

VERSION = "2.20.2"


def fetch(folder: Path) -> None:
    """Unpacks the wheel into `folder`. Raises CalledProcessError if pip cannot have it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    wheel = folder.with_name(f"{folder.name}.wheel")
    subprocess.run([*pip, "--only-binary=:all:", "--dest", wheel, f"transformer-engine=={VERSION}"], check=True)
    subprocess.run([sys.executable, "-m", "zipfile", "-e", *wheel.glob("*.whl"), folder], check=True)


class _Bindings(types.ModuleType):
    """Every name is there; a type is one whose values have names only."""

    class DType(enum.IntEnum):
        kByte, kInt32, kFloat32, kFloat16, kBFloat16, kFloat8E4M3, kFloat8E5M2, kFloat4E2M1 = range(8)

    # Transformer Engine compares these with its own list when it is imported.
    NVTE_Fused_Attn_Backend = enum.IntEnum(
        "NVTE_Fused_Attn_Backend",
        {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2},
    )

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, MagicMock(name=name))
        return getattr(self, name)


class Calls(list):
    """Names of Transformer Engine's own collectives, in the order of their calls."""


def prepare(folder: Path) -> Calls:
    """Makes `transformer_engine.pytorch` importable from `folder`; returns what records its own collectives.

    A linear of it then computes on CPU tensors, and reduces over gloo.
    """
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # it then does not look for CUDA's libraries
    sys.path.insert(0, str(folder))
    sys.modules["transformer_engine_torch"] = _Bindings("transformer_engine_torch")
    # Of another package, which is not installed; used for exports alone.
    sys.modules["transformer_engine.pytorch.onnx_extensions"] = MagicMock()
    # Without a GPU these raise.
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(major=8)

    sys.modules["transformer_engine.pytorch"] = None  # not yet: it would load the bindings
    import transformer_engine.common

    del sys.modules["transformer_engine.pytorch"]
    transformer_engine.common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch.module.linear as linear
    from transformer_engine.pytorch.module import base

    calls = Calls()
    linear.general_gemm = _product
    linear.allreduce, linear.reduce_scatter_along_first_dim = _collectives(calls)
    for user in (linear, base):
        user.nvtx_range_push = user.nvtx_range_pop = lambda *args: None
    module = base.TransformerEngineBaseModule
    # Each asks once whether it is on a GPU.
    module.__init__ = _told(torch.cuda, "is_available", lambda: True, module.__init__)
    module.prepare_forward = _told(torch.Tensor, "is_cuda", True, module.prepare_forward)
    return calls


def _told(owner, name, answer, method):
    """`method`, for whose calls `owner.name` is `answer`."""

    @functools.wraps(method)
    def told(*args, **kwargs):
        with patch.object(owner, name, answer):
            return method(*args, **kwargs)

    return told


def _product(weight, x, *, bias=None, **options):
    y = torch.matmul(x, weight.t())
    return (y if bias is None else y + bias), None, None, None


def _collectives(calls: Calls):
    def allreduce(x, group, async_op=False):
        calls.append("all-reduce")
        dist.all_reduce(x, group=group)
        return x, None

    def reduce_scatter(x, group, async_op=False):
        calls.append("reduce-scatter")
        out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
        dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
        return out, None

    return allreduce, reduce_scatter
