# SPDX-License-Identifier: Apache-2.0
"""A real pretrained Llama on real Megatron-Core: SmolLM2-135M-Instruct at TP 3, and with padded heads at 4."""

import pytest
import torch
from checkpoints import reference
from ranks import run_ranks

from megatron_comp.inference.generate import generate, logits
from megatron_comp.inference.model import build_model, init_parallel

PROMPT = "The three branches of the government of the United States are"
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def references(smollm2, smollm2_padded, sotu_text):
    """Hugging Face's logits for 96 tokens of prose, of the model and of its padded form, and the model's answer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    with open(sotu_text) as text:
        ids = torch.tensor([tokenizer(text.read(2000))["input_ids"][:96]])
    prompt = tokenizer(PROMPT)["input_ids"]
    plain = reference(smollm2, ids, prompt, NEW_TOKENS)
    padded = reference(smollm2_padded, ids, prompt, NEW_TOKENS, plain.tokens)
    return {"plain": plain, "padded": padded}


def run(rank, world_size, ref):
    init_parallel(world_size)
    model = build_model(ref.folder)
    made = generate(model, ref.prompt, NEW_TOKENS)
    out = logits(model, ref.ids, gather=True)
    return made.tokens, (out - ref.logits).abs().max().item()


@pytest.mark.parametrize("tp, name", [(3, "plain"), (4, "padded")])
def test_equals_hugging_face(references, record_property, tp, name):
    ref = references[name]
    results = run_ranks(run, tp, ref, timeout=300)
    record_property("max_abs_difference", results[0][1])
    for tokens, difference in results:
        assert tokens == ref.tokens
        assert difference < 1e-4
