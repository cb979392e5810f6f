# SPDX-License-Identifier: Apache-2.0
"""How a prompt is cut for pipeline stages. Knows neither Megatron nor torch: predictions cut prompts the same way.

P stages take (C + P - 1) / C of one stage's time for C chunks. Chunks of fewer tokens take longer per token than they
save.
"""

PER_STAGE = 4
LEAST_TOKENS = 64


def chunk_tokens(tokens: int, stages: int, multiple: int = 1) -> int:
    """How many of a prompt's tokens go through the stages at a time: a multiple of `multiple`, or all of them."""
    if stages == 1:
        return tokens
    least = max(LEAST_TOKENS, -(-tokens // (PER_STAGE * stages)))
    return min(tokens, -(-least // multiple) * multiple)


def chunk_count(tokens: int, stages: int) -> int:
    return -(-tokens // chunk_tokens(tokens, stages))
