# SPDX-License-Identifier: Apache-2.0
"""Megatron's Mamba on a machine without CUDA: its kernels in plain torch."""

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.mamba.mamba_model import MambaModel
from megatron.core.ssm import mamba_mixer
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_comp.inference.attention import CausalAttention
from megatron_comp.inference.model import RMSNorm


class GatedRMSNorm(torch.nn.Module):
    """What `mamba_ssm` has as a CUDA kernel: RMSNorm of x * silu(z), over groups."""

    def __init__(self, hidden, eps, group_size, norm_before_gate, device, dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden, dtype=dtype))
        self.eps, self.group_size = eps, group_size

    def forward(self, x, z):
        gated = (x * torch.nn.functional.silu(z)).unflatten(-1, (-1, self.group_size))
        return (gated * gated.square().mean(-1, keepdim=True).add(self.eps).rsqrt()).flatten(-2) * self.weight


def scan(x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_softplus, return_final_states, **absent):
    """What `mamba_ssm` has as CUDA kernels, token by token: x [b, l, h, p], dt [b, l, h], B and C [b, l, g, n]."""
    assert z is None and dt_softplus and not return_final_states and not any(absent.values())
    dt = torch.nn.functional.softplus(dt + dt_bias)
    B, C = (each.repeat_interleave(x.shape[2] // each.shape[2], dim=2) for each in (B, C))
    state, out = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1]), []
    for now in range(x.shape[1]):
        kept = (dt[:, now] * A).exp()[..., None, None]
        state = kept * state + (dt[:, now, :, None] * x[:, now])[..., None] * B[:, now, :, None]
        out.append((state * C[:, now, :, None]).sum(-1) + D[:, None] * x[:, now])
    return torch.stack(out, dim=1)


def mamba_model(vocabulary):
    """Megatron's own Mamba mixer, layers and stack, with attention and an MLP in between. Random weights."""
    mamba_mixer.HAVE_MAMBA_SSM = True
    mamba_mixer.mamba_chunk_scan_combined, mamba_mixer.ExtendedRMSNorm = scan, GatedRMSNorm
    mixer = mamba_mixer.MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=CausalAttention, linear_proj=RowParallelLinear
    )
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    stack = MambaStackSubmodules(
        mamba_layer=ModuleSpec(
            MambaLayer,
            submodules=MambaLayerSubmodules(
                norm=RMSNorm,
                mixer=ModuleSpec(mamba_mixer.MambaMixer, submodules=mixer),
                mamba_bda=get_bias_dropout_add,
            ),
        ),
        attention_layer=ModuleSpec(
            TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=RMSNorm,
                self_attention=ModuleSpec(
                    SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
                ),
                self_attn_bda=get_bias_dropout_add,
            ),
        ),
        mlp_layer=ModuleSpec(
            MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=RMSNorm, mlp=ModuleSpec(MLP, submodules=mlp), mlp_bda=get_bias_dropout_add
            ),
        ),
    )
    # Without its final norm, which is Transformer Engine's whatever the spec says.
    spec = ModuleSpec(MambaStack, params={"post_layer_norm": False}, submodules=stack)
    config = TransformerConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        mamba_num_heads=4,
        mamba_head_dim=16,
        mamba_num_groups=2,
        mamba_state_dim=8,
        use_mamba_mem_eff_path=False,
        add_bias_linear=False,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
    )
    return MambaModel(
        config,
        mamba_stack_spec=spec,
        vocab_size=vocabulary,
        max_sequence_length=32,
        hybrid_override_pattern="M*-M",
    )
