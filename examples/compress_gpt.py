# SPDX-License-Identifier: Apache-2.0
"""A small GPT of Megatron-Core, stock and with compressed sums: torchrun --nproc-per-node 2 examples/compress_gpt.py"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig

import megatron_comp as mc

torch.cuda.current_device = lambda: "cpu"  # Megatron asks for a device even where there is no GPU
dist.init_process_group("gloo")
parallel_state.initialize_model_parallel(dist.get_world_size())
get_cuda_rng_tracker(inference_rng_tracker=True)
torch.manual_seed(1)  # random weights, the same on all ranks
size = {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 8, "use_cpu_initialization": True}
config = TransformerConfig(**size, tensor_model_parallel_size=dist.get_world_size())
model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=512, max_sequence_length=128).eval()
tokens, future = torch.arange(128)[None], torch.ones(128, 128, dtype=torch.bool).triu(1)[None, None]
with torch.no_grad():
    stock = model(tokens, tokens, future)
    mc.apply_compression(model, mc.CompressionPolicy(codec="int4:32:fp16:hadamard", min_bytes=0))
    compressed = model(tokens, tokens, future)
if dist.get_rank() == 0:
    print(f"{mc.stats(model)}; logits differ by {(compressed - stock).norm() / stock.norm():.1%}")
dist.destroy_process_group()
