# SPDX-License-Identifier: Apache-2.0
"""A small GPT of Megatron-Core with compressed tensor-parallel sums: build, compress, run, count; seconds on CPUs.

    torchrun --nproc-per-node 2 examples/compress_gpt.py

Prints how many sums were compressed, in how many bits per value, and how far the logits moved (weights are random).
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

import megatron_comp as mc

torch.cuda.current_device = lambda: torch.device("cpu")  # Megatron asks for one even where there is no GPU
dist.init_process_group("gloo")
tp = dist.get_world_size()
parallel_state.initialize_model_parallel(tp)
torch.manual_seed(1)
model_parallel_cuda_manual_seed(1, inference_rng_tracker=True)
size = {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 8}
config = TransformerConfig(**size, tensor_model_parallel_size=tp, use_cpu_initialization=True)
model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=512, max_sequence_length=128).eval()

tokens = torch.arange(128)[None]
mask = torch.ones(1, 1, 128, 128, dtype=torch.bool).triu(1)
with torch.no_grad():
    stock = model(tokens, tokens, mask)
    policy = mc.CompressionPolicy(codec="int4:32:fp16:hadamard", algorithm="gather_sum", min_bytes=0)
    mc.apply_compression(model, policy)
    compressed = model(tokens, tokens, mask)
if dist.get_rank() == 0:
    sums, error = mc.stats(model), (compressed - stock).norm() / stock.norm()
    print(f"{sums.compressed.calls} sums in {sums.bits_per_value} bits per value; logits differ by {error:.1%}")
dist.destroy_process_group()
