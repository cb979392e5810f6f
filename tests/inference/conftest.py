# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints, one for each thing that a Llama's shape can do, with what Hugging Face makes of them."""

import pytest
import torch
from checkpoints import reference, tiny_llama

LLAMA3_ROPE = {  # so short an original context that the scaling rule moves most frequencies
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

SHAPES = {
    # Llama-2: a key-value head per query head, own output weights; 131 tokens do not divide by 2 or 4.
    "llama2": {"vocab_size": 131},
    # Llama-3: grouped heads, scaled rotary frequencies, in shards, tied; heads x head size is not the hidden size.
    "llama3": {
        "num_attention_heads": 12,
        "num_key_value_heads": 6,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA3_ROPE,
        "max_shard_size": "60KB",
    },
    # Fewer key-value heads than ranks at TP 4: a rank's rows of the fused projection begin inside a group.
    "two_groups": {"num_attention_heads": 8, "num_key_value_heads": 2, "rms_norm_eps": 1e-3},
    # One key-value head at TP 3: a rank's rows begin inside a head.
    "one_group": {
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    },
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """name -> Reference, for every shape. 37 tokens: no multiple of any number of ranks."""
    references = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        folder = tiny_llama(tmp_path_factory.mktemp(name), seed=seed, **shape)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 128, (2, 37), generator=generator)
        references[name] = reference(folder, ids, ids[0, :29].tolist(), 12)
    return references
