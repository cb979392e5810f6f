# SPDX-License-Identifier: Apache-2.0
"""Names for what a sum does, in profiles of torch.profiler and, under torch.autograd.profiler.emit_nvtx, of Nsight."""

from contextlib import AbstractContextManager, nullcontext

import torch

_NOTHING = nullcontext()


def span(name: str) -> AbstractContextManager:
    """A range called `megatron_comp.<name>`; without a profiler nothing, for 0.1 us."""
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(f"megatron_comp.{name}")
    return _NOTHING
