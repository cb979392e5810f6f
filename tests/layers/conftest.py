# SPDX-License-Identifier: Apache-2.0
"""A tiny random Llama that fits TP 1, 2 and 3."""

import pytest
from checkpoints import tiny_llama


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Folder: 4 layers, hidden 96, 12 query heads over 6 key-value heads."""
    return tiny_llama(
        tmp_path_factory.mktemp("llama"),
        num_hidden_layers=4,
        num_attention_heads=12,
        num_key_value_heads=6,
        head_dim=8,
        max_position_embeddings=64,
    )
