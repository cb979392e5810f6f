# SPDX-License-Identifier: Apache-2.0
"""Generation: stopping, the callback, the figures, and what bad prompts say."""

import pytest
import torch
from ranks import run_ranks

from megatron_comp.inference.generate import Generation, generate, logits
from megatron_comp.inference.model import build_model, init_parallel


def error_of(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "no error"


def everything(rank, world_size, ref):
    init_parallel(world_size)
    model = build_model(ref.folder, max_sequence_length=48)
    seen = []
    made = generate(model, torch.tensor(ref.prompt), 8, on_token=seen.append)
    stopped = generate(model, ref.prompt, 8, eos_ids={ref.tokens[2]})
    single = generate(model, ref.prompt, 1)
    errors = [
        error_of(generate, model, [], 4),
        error_of(generate, model, [1], 0),
        error_of(generate, model, [1, 131], 4),
        error_of(generate, model, [1, -1], 4),
        error_of(generate, model, [1] * 40, 9),
        error_of(generate, model, [1] * 40, 8),
        error_of(logits, model, torch.ones(1, 49, dtype=torch.long)),
        error_of(logits, model, torch.full((1, 4), 131)),
        error_of(logits, model, torch.ones(4, dtype=torch.long)),
    ]
    rounded = logits(build_model(ref.folder, dtype=torch.bfloat16), ref.ids)
    return made, seen, stopped, single, errors, rounded


def test_generation(tiny):
    ref = tiny["llama2"]
    made, seen, stopped, single, errors, rounded = run_ranks(everything, 1, ref)[0]
    assert made.tokens == ref.tokens[:8] == seen
    assert made.ttft_seconds > 0 and made.tokens_per_second == 7 / made.decode_seconds
    assert stopped.tokens == ref.tokens[: ref.tokens.index(ref.tokens[2]) + 1]
    assert single.tokens == ref.tokens[:1] and single.tokens_per_second == 0
    assert errors == [
        "need at least one prompt token and one new token, got 0 and 4",
        "need at least one prompt token and one new token, got 1 and 0",
        "token 131 is outside the vocabulary of 131",
        "token -1 is outside the vocabulary of 131",
        "prompt of 40 tokens and 9 new ones exceed the model's context of 48 tokens",
        "no error",
        "49 tokens exceed the model's context of 48 tokens",
        "token 131 is outside the vocabulary of 131",
        "ids must have the shape [batch, tokens] and not be empty, got [4]",
    ]
    assert rounded.dtype == torch.bfloat16
    assert 1e-4 < (rounded - ref.logits).abs().mean() < 0.02 * ref.logits.std()


def test_rate_counts_tokens_after_the_first():
    assert Generation([5, 6, 7], 1.0, 0.5).tokens_per_second == pytest.approx(4.0)
