# SPDX-License-Identifier: Apache-2.0
"""A GPT model on every rank, written with Megatron-Core alone: what `megatron_comp.run` compresses as it is.

    torchrun --nproc-per-node 2 -m megatron_comp.run --codec mxfp4 --min-bytes 0 examples/stock_gpt.py

Random weights, one prefill and greedy decoding on a key-value cache; prints the tokens. `--experts 4` makes it a
mixture of experts of Mixtral's kind; `--expert-parallel 2` gives each of two ranks whole experts, instead of a part of
each.
"""

import argparse
import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig

VOCABULARY, LONGEST = 128, 64


def build_model(tp: int, experts: int | None = None, expert_parallel: int = 1) -> GPTModel:
    mixture = {
        "num_moe_experts": experts,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "expert_model_parallel_size": expert_parallel,
        "expert_tensor_parallel_size": tp // expert_parallel,
        "add_bias_linear": False,
    }
    config = TransformerConfig(
        num_layers=2,
        hidden_size=96,
        num_attention_heads=12,
        ffn_hidden_size=192,
        tensor_model_parallel_size=tp,
        use_cpu_initialization=not torch.cuda.is_available(),
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        **(mixture if experts else {}),
    )
    model = GPTModel(config, get_gpt_layer_local_spec(num_experts=experts), VOCABULARY, LONGEST)
    return model.cuda().eval() if torch.cuda.is_available() else model.eval()


@torch.no_grad()
def generate(model: GPTModel, prompt: list[int], count: int) -> list[int]:
    device = next(model.parameters()).device
    context = StaticInferenceContext(1, LONGEST)
    tokens, given = list(prompt), torch.tensor([prompt], device=device)
    for _ in range(count):
        length = given.shape[1]
        positions = torch.arange(context.sequence_len_offset, context.sequence_len_offset + length, device=device)
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu(1)
        logits = model(given, positions[None], mask, inference_context=context, runtime_gather_output=True)
        context.increment_sequence_len_offset(length)
        context.enable_decode_mode()
        tokens.append(int(logits[0, -1].argmax()))
        given = torch.tensor([tokens[-1:]], device=device)
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=8, metavar="K")
    parser.add_argument("--experts", type=int, metavar="E", help="a mixture of so many experts, two for each token")
    parser.add_argument("--expert-parallel", type=int, default=1, metavar="R", help="ranks that share out the experts")
    args = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:  # Megatron asks for the current device wherever it allocates
        torch.cuda.current_device = lambda: torch.device("cpu")
        # Megatron-Core 0.16 names this function of Transformer Engine's in its router without having imported it.
        moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    ranks = dist.get_world_size()
    parallel_state.initialize_model_parallel(
        ranks,
        expert_model_parallel_size=args.expert_parallel,
        expert_tensor_parallel_size=ranks // args.expert_parallel,
    )
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1, inference_rng_tracker=True, force_reset_rng=True)
    model = build_model(ranks, args.experts, args.expert_parallel)
    tokens = generate(model, list(range(2, 26)), args.new_tokens)
    if dist.get_rank() == 0:
        print(*tokens)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
