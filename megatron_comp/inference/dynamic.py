# SPDX-License-Identifier: Apache-2.0
"""Greedy text of several prompts at once, from Megatron's dynamic engine, whose attention is flash-attn's on a GPU."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.engines import DynamicInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer import attention

from .generate import checked_prompt

BLOCK = 256  # tokens of a block of the cache


@dataclass(slots=True)
class Generations:
    """What `generate_together` made."""

    tokens: list[list[int]]
    """New tokens of each prompt, the end-of-sequence token included if it came."""
    ttft_seconds: float
    """From the start to the end of the engine's first step."""
    decode_seconds: float
    """For all its other steps."""


class _NoText:
    """In place of a tokenizer: requests are tokens, and so is what comes back."""

    bos = eod = None

    def detokenize(self, _tokens: Sequence[int]) -> str:
        return ""


def generate_together(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
    on_step: Callable[[], None] | None = None,
) -> Generations:
    """Continues prompts greedily, all in the engine's batches. Every rank calls this, with the same tokens.

    Each prompt stops after `max_new_tokens`, or after a token of `eos_ids`. on_step is called after each engine step.

    Raises ValueError where flash-attn is missing, for no prompts, and for what `generate` refuses.
    """
    _check_attention()
    if not prompts:
        raise ValueError("need at least one prompt")
    prompts = [checked_prompt(model, ids, max_new_tokens)[0].tolist() for ids in prompts]
    engine = _engine(model, len(prompts), max(map(len, prompts)) + max_new_tokens)
    how = {"top_k": 1, "num_tokens_to_generate": max_new_tokens, "termination_id": min(eos_ids, default=-1)}
    for number, ids in enumerate(prompts):
        engine.add_request(number, ids, SamplingParams(**how))
    # The engine would take the padding of the vocabulary for tokens.
    mask = model.register_forward_hook(_without_padding)
    made, ends = {}, [time.perf_counter()]
    try:
        while engine.has_unfinished_requests():
            for record in engine.step_modern()["finished_request_records"]:
                made[record.request_id] = record.merge().generated_tokens
            ends.append(time.perf_counter())
            if on_step:
                on_step()
    finally:
        mask.remove()
    tokens = [_until_end(made[number], eos_ids) for number in range(len(prompts))]
    return Generations(tokens, ends[1] - ends[0], ends[-1] - ends[1])


def _check_attention() -> None:
    try:
        found = getattr(attention, "HAVE_FA3", False) or attention.is_fa_min_version("2.7.3")
    except ImportError:
        found = False
    if not found:
        raise ValueError("the dynamic engine needs flash-attn 2.7.3 or newer, and a GPU")


def _without_padding(model: GPTModel, _inputs: tuple, logits: torch.Tensor) -> torch.Tensor:
    logits[..., model.hf_config.vocab_size :] = -torch.inf
    return logits


def _until_end(tokens: list[int], eos_ids: Collection[int]) -> list[int]:
    """The engine knows one end; a text may have several."""
    ends = [number for number, token in enumerate(tokens) if token in eos_ids]
    return tokens[: ends[0] + 1] if ends else tokens


def _engine(model: GPTModel, requests: int, longest: int) -> DynamicInferenceEngine:
    config, ranks = model.config, model.config.tensor_model_parallel_size
    requests = -(-requests // ranks) * ranks  # Megatron asks for a multiple
    blocks = requests * -(-longest // BLOCK) + 2  # one of them is never used
    of_block = 2 * config.num_layers * BLOCK * config.num_query_groups // ranks * config.kv_channels
    shared = {
        "max_sequence_length": longest,
        "buffer_size_gb": blocks * of_block * config.params_dtype.itemsize / 2**30,
        "max_requests": requests,
        "block_size_tokens": BLOCK,
    }
    try:
        from megatron.core.inference.config import InferenceConfig
    except ImportError:  # before Megatron-Core 0.17
        return _engine_of_16(model, shared)
    context = DynamicInferenceContext(config, InferenceConfig(**shared))
    return DynamicInferenceEngine(TextGenerationController(GPTInferenceWrapper(model, context), _NoText()), context)


def _engine_of_16(model: GPTModel, shared: dict) -> DynamicInferenceEngine:
    from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig

    config = model.config
    context = DynamicInferenceContext(
        params_dtype=config.params_dtype,
        num_layers=config.num_layers,
        kv_channels=config.kv_channels,
        num_attention_heads=config.num_query_groups,
        **shared,
    )
    wrapper_config = InferenceWrapperConfig(
        hidden_size=config.hidden_size,
        params_dtype=config.params_dtype,
        inference_batch_times_seqlen_threshold=-1,
        padded_vocab_size=model.vocab_size,
        inference_max_requests=shared["max_requests"],
        inference_max_seq_length=shared["max_sequence_length"],
    )
    wrapper = GPTInferenceWrapper(model, wrapper_config, context)
    return DynamicInferenceEngine(TextGenerationController(wrapper, _NoText()), context, random_seed=1)
