# SPDX-License-Identifier: Apache-2.0
"""Causal attention for Megatron's `core_attention` slot, on PyTorch's `scaled_dot_product_attention`.

Megatron's own local attention builds its causal mask on a hard-coded CUDA device and keeps all scores in memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class CausalAttention(torch.nn.Module):
    """Each query sees the keys up to its own position.

    Shapes, per tensor-parallel rank (s tokens, b batch, h heads, g key-value heads, d head size):
        query [s_q, b, h, d], key and value [s_k, b, g, d] -> [s_q, b, h * d]; h is a multiple of g.

    The s_q queries are the last s_q of the s_k positions: all of them in a forward without cache, one in decoding, a
    chunk of the prompt in between. The mask follows from the lengths alone, so `attn_mask_type` is not read
    (Megatron passes "no mask" as soon as a cache is not empty, which would be wrong for a chunk).
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **kwargs):
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        /,
        *,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params=None,
    ) -> Tensor:
        """Raises ValueError for a mask, bias or packed sequences: this attention is causal by position only."""
        if attention_mask is not None or attention_bias is not None or packed_seq_params is not None:
            raise ValueError(
                "CausalAttention is causal by position: attention_mask, attention_bias and packed_seq_params "
                "must be None"
            )
        queries, keys = query.shape[0], key.shape[0]
        mask = None
        if 1 < queries < keys:
            # is_causal would align query 0 with key 0; the queries are the last positions, not the first.
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        out = F.scaled_dot_product_attention(
            *(x.permute(1, 2, 0, 3) for x in (query, key, value)),
            attn_mask=mask,
            is_causal=queries == keys and queries > 1,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return out.permute(2, 0, 1, 3).flatten(2)
