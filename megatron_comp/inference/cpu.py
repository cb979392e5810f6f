# SPDX-License-Identifier: Apache-2.0
"""Everything that Megatron-Core needs on a machine without CUDA. With CUDA nothing here does anything."""

import functools
from contextlib import contextmanager

import torch
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.moe import moe_utils, token_dispatcher

# A product of so many rows with bf16 weights is faster as it is: 0.19 and 0.36 ms of one and two rows with [1536, 576],
# 0.21 and 0.35 through fp32; from four rows on fp32 wins, 0.50 to 0.71 (AVX2, one thread).
FEW_ROWS = 2


def _cpu_device() -> torch.device:
    return torch.device("cpu")


def _nothing_to_wait_for(device=None) -> None:
    pass


def prepare() -> None:
    """Makes Megatron-Core's inference path run without CUDA. May be called any number of times; a no-op with CUDA.

    Megatron passes `device=torch.cuda.current_device()` where it allocates the KV cache, gathered outputs and rotary
    tables, and that call is an error in a build without CUDA. Here it answers with the CPU. Its checkpoints' writer
    waits for copies from the GPU, of which there are none.
    """
    if not torch.cuda.is_available():
        torch.cuda.current_device = _cpu_device
        torch.cuda.synchronize = _nothing_to_wait_for
        _multiply_fast()
        # Megatron-Core 0.16 names this function of Transformer Engine's in its router without having imported it.
        moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)


def _multiply_fast() -> None:
    """Products of bf16 with frozen weights through fp32, where the processor has no instructions for bf16.

    With AVX2 torch multiplies bf16 at 8 GFLOP/s a thread and fp32 at 51, casts included. One or two rows, as decoding
    and the logits of a prompt's last token have, are no such product: there torch reads bf16 weights as they are, at
    9 GB/s, and casting [24576, 576] of them first took 73 ms instead of 3.
    """
    multiply = layers.linear_with_frozen_weight
    if torch.backends.cpu.get_cpu_capability() != "AVX2" or hasattr(multiply, "__wrapped__"):
        return

    @functools.wraps(multiply)
    def through_fp32(input, weight, *args, **kwargs):  # named as Megatron names them
        if input.dtype != torch.bfloat16 or input.shape[:-1].numel() <= FEW_ROWS:
            return multiply(input, weight, *args, **kwargs)
        # Of a transposed [1, s, h], as embeddings are, torch would make a product of s matrices of one row: 3 times as
        # slow. Strides in order make it one matrix.
        rows = input.to(torch.float32, memory_format=torch.contiguous_format)
        return multiply(rows, weight.float(), *args, **kwargs).to(input.dtype)

    layers.linear_with_frozen_weight = through_fp32


class _Stream:
    """A CPU does one thing after the other: a stream, or an event in it, that nothing has to wait for."""

    def record_event(self) -> "_Stream":
        return self

    def wait_stream(self, _other: "_Stream") -> None:
        pass

    def synchronize(self) -> None:
        pass


@contextmanager
def _on_stream(_stream: _Stream):
    yield


def prepare_streams() -> None:
    """Lets the all-to-all token dispatcher and overlapped shared experts run without CUDA; a no-op with CUDA.

    Apart from `prepare`, because other libraries ask whether there are streams when they are imported. Counts of tokens
    become numpy arrays on their way from GPU to CPU, which the collectives then take; here they are to be made so.
    """
    if not torch.cuda.is_available():
        torch.cuda.Stream, torch.cuda.stream = _Stream, _on_stream
        torch.cuda.current_stream = _Stream
        token_dispatcher.maybe_move_tensor_to_cpu = _as_if_moved


def _as_if_moved(tensor, as_numpy: bool = False, record_stream: bool = False):
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def config_options() -> dict[str, object]:
    """`TransformerConfig` options for a machine without CUDA; empty with CUDA.

    Megatron allocates weights on the GPU unless it is told to initialize them on the CPU.
    """
    return {} if torch.cuda.is_available() else {"use_cpu_initialization": True}
