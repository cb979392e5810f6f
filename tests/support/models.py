# SPDX-License-Identifier: Apache-2.0
"""What tests of compressed models share: a policy's defaults, small models with experts, and views of a model."""

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig

import megatron_comp as mc
from megatron_comp.inference import cpu
from megatron_comp.inference.attention import CausalAttention
from megatron_comp.inference.generate import logits
from megatron_comp.inference.model import RMSNorm

# Of the fixture `llama`
LAYERS, HIDDEN = 4, 96
IDS = torch.arange(2, 24).view(2, 11)  # 22 rows: no multiple of 3


def policy(**words):
    """mxfp4 everywhere, however small the message."""
    return mc.CompressionPolicy(**{"codec": "mxfp4", "min_bytes": 0} | words)


def message_of(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "no error"


def all_logits(model):
    return logits(model, IDS, gather=True)


def inside_view(model):
    """What removing compression restores."""
    return {
        "classes": [type(module) for module in model.modules()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "communication": [m.explicit_expert_comm for m in model.modules() if isinstance(m, RowParallelLinear)],
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
    }


def experts_model(layers=(1, 1), **options):
    """A random mixture of experts without Transformer Engine, two of four experts to a token.

    layers: 1 where a layer has experts, 0 where it has an MLP. options: of TransformerConfig.
    """
    cpu.prepare_streams()
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    defaults = {
        "moe_token_dispatcher_type": "allgather",
        "moe_router_load_balancing_type": "none",
        "sequence_parallel": False,
    }
    config = TransformerConfig(
        num_layers=len(layers),
        hidden_size=64,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_moe_experts=4,
        moe_layer_freq=list(layers),
        moe_router_topk=2,
        normalization="RMSNorm",
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=ranks,
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        **(defaults | options),
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        layer.submodules.self_attention.submodules.core_attention = CausalAttention
    spec.layer_norm = RMSNorm
    torch.manual_seed(0)
    return GPTModel(config, spec, vocab_size=32, max_sequence_length=32, position_embedding_type="rope").eval()


EXPERT_IDS = torch.arange(16).view(2, 8)


def whole_logits(model, ids=EXPERT_IDS):
    """Of an `experts_model`, on every rank."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        return model(ids, positions, None, runtime_gather_output=True)


def biased_model(layer_class, **options):
    """A random GPT with a bias everywhere, its layers of a class that the spec names."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        hidden_dropout=0.0,
        init_method_std=0.2,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        **options,
    )
    spec = get_gpt_layer_local_spec()
    spec.module = layer_class
    spec.submodules.self_attention.submodules.core_attention = CausalAttention
    torch.manual_seed(0)
    model = GPTModel(config, spec, vocab_size=32, max_sequence_length=32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model
