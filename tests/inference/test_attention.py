# SPDX-License-Identifier: Apache-2.0
"""CausalAttention against a loop over positions: whole sequences, chunks, single tokens, grouped heads."""

import math

import pytest
import torch

from megatron_comp.inference.attention import CausalAttention


def naive(query, key, value, scale):
    """[s_q, b, h, d] and [s_k, b, g, d] -> [s_q, b, h * d]; query i stands at position s_k - s_q + i."""
    out = torch.zeros_like(query)
    repeat = query.shape[2] // key.shape[2]
    for i in range(query.shape[0]):
        seen = key.shape[0] - query.shape[0] + i + 1
        for b in range(query.shape[1]):
            for h in range(query.shape[2]):
                scores = key[:seen, b, h // repeat] @ query[i, b, h] * scale
                out[i, b, h] = scores.softmax(0) @ value[:seen, b, h // repeat]
    return out.flatten(2)


def attend(query, key, value, scale=None, **kwargs):
    return CausalAttention(None, 1, None, "self", softmax_scale=scale)(query, key, value, None, **kwargs)


@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize("queries, keys", [(9, 9), (4, 9), (8, 9), (1, 9), (1, 1)])
def test_equals_loop(queries, keys, groups):
    torch.manual_seed(0)
    query, key, value = torch.randn(queries, 2, 6, 8), torch.randn(keys, 2, groups, 8), torch.randn(keys, 2, groups, 8)
    torch.testing.assert_close(attend(query, key, value), naive(query, key, value, 1 / math.sqrt(8)))
    torch.testing.assert_close(attend(query, key, value, 0.5), naive(query, key, value, 0.5))


def test_chunks_equal_the_whole():
    torch.manual_seed(0)
    query, key, value = (torch.randn(11, 1, 4, 8) for _ in range(3))
    ends = [0, 5, 6, 9, 11]
    chunks = [attend(query[a:b], key[:b], value[:b]) for a, b in zip(ends, ends[1:])]
    torch.testing.assert_close(torch.cat(chunks), attend(query, key, value))


def test_masks_are_refused():
    x = torch.randn(3, 1, 2, 4)
    attention = CausalAttention(None, 1, None, "self")
    with pytest.raises(ValueError, match="causal by position"):
        attention(x, x, x, torch.ones(1, 1, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="packed_seq_params must be None"):
        attend(x, x, x, packed_seq_params=object())
