# SPDX-License-Identifier: Apache-2.0
"""What Megatron's DynamicInferenceEngine needs on a machine without CUDA: its paged attention in plain torch.

As a script it runs another script, or a module, with that.
"""

import contextlib
import functools
import runpy
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core.inference.contexts import dynamic_context
from megatron.core.transformer import attention
from torch.cuda import nvtx


class Idle:
    """A stream, or an event in it, of a machine that does one thing after the other."""

    def __init__(self, *_args, **_options):
        pass

    def record(self, _stream=None):
        pass

    def wait_event(self, _event):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, _later):
        return 1.0


def without_cuda():
    """For the rest of this process. Megatron's own code for everything else: queue, blocks of the cache, batches."""
    attention.is_fa_min_version = lambda *_args, **_kwargs: True
    attention.flash_attn_varlen_func = of_mixed_steps
    attention.flash_attn_with_kvcache = of_decode_steps
    # Its Triton kernel writes the cache on a GPU; what Megatron does without Triton works anywhere.
    dynamic_context.triton_append_key_value_cache = None
    nvtx._nvtx = types.SimpleNamespace(rangePushA=lambda _name: 0, rangePop=lambda: 0)
    for name in ("empty", "empty_like", "full", "ones", "zeros"):
        setattr(torch, name, _unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *_args: self
    torch.cuda.Event, torch.cuda.Stream, torch.cuda.current_stream = Idle, Idle, Idle
    torch.cuda.stream = contextlib.nullcontext


def of_mixed_steps(q, k_cache, v_cache, ends, ends_of_keys, *_longest, softmax_scale, block_table, **_options):
    """flash-attn's `flash_attn_varlen_func`: queries `[tokens, heads, width]`, one request after the other."""
    out = torch.zeros_like(q)
    for request, blocks in enumerate(block_table):
        start, end = ends[request : request + 2].tolist()
        keys = int(ends_of_keys[request + 1] - ends_of_keys[request])
        if start < end:
            out[start:end] = _attend(q[start:end], k_cache, v_cache, blocks, keys, softmax_scale)
    return out


def of_decode_steps(q, k_cache, v_cache, cache_seqlens, block_table, softmax_scale=None, **_options):
    """flash-attn's `flash_attn_with_kvcache`: one query `[requests, 1, heads, width]` of each request."""
    out = torch.zeros_like(q)
    for request, keys in enumerate(cache_seqlens.tolist()):
        if keys:
            out[request] = _attend(q[request], k_cache, v_cache, block_table[request], keys, softmax_scale)
    return out


def _attend(q, k_cache, v_cache, blocks, keys, scale):
    """Queries `[n, heads, width]` that are the last of `keys` tokens, each to itself and all before it."""
    size = k_cache.shape[1]
    used = blocks[: -(-keys // size)].long()
    k, v = (cache[used].flatten(0, 1)[:keys].transpose(0, 1) for cache in (k_cache, v_cache))
    mask = torch.ones(len(q), keys, dtype=torch.bool).tril(keys - len(q))
    groups = q.shape[1] // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    return F.scaled_dot_product_attention(q.transpose(0, 1), k, v, mask, scale=scale).transpose(0, 1)


def _unpinned(make):
    """Without a GPU, memory for copies to it is ordinary memory."""

    @functools.wraps(make)
    def made(*args, pin_memory=False, **how):
        return make(*args, **how)

    return made


if __name__ == "__main__":
    # dynamic_engine.py SCRIPT.py|MODULE [arguments]
    sys.path.insert(0, str(Path(__file__).parents[2]))
    without_cuda()
    del sys.argv[0]
    run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
    run(sys.argv[0], run_name="__main__")
