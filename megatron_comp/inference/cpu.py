"""Everything that Megatron-Core needs on a machine without CUDA. With CUDA nothing here does anything."""

import torch


def _cpu_device() -> torch.device:
    return torch.device("cpu")


def prepare() -> None:
    """Makes Megatron-Core's inference path run without CUDA. May be called any number of times; a no-op with CUDA.

    Megatron passes `device=torch.cuda.current_device()` where it allocates the KV cache, gathered outputs and rotary
    tables, and that call is an error in a build without CUDA. Here it answers with the CPU.
    """
    if not torch.cuda.is_available():
        torch.cuda.current_device = _cpu_device


def config_options() -> dict[str, object]:
    """`TransformerConfig` options for a machine without CUDA; empty with CUDA.

    Megatron allocates weights on the GPU unless it is told to initialize them on the CPU.
    """
    return {} if torch.cuda.is_available() else {"use_cpu_initialization": True}
