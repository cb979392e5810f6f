# SPDX-License-Identifier: Apache-2.0
"""Greedy text and logits from a model of `model.build_model`. Every rank calls these together, with the same tokens."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from . import finite, stages
from .chunks import chunk_tokens

NOT_FINITE = -1  # in place of a token


@dataclass(slots=True)
class Generation:
    """What `generate` made."""

    tokens: list[int]
    """New tokens, the end-of-sequence token included if it came."""
    ttft_seconds: float
    """From the start to the first token: the prefill of the whole prompt."""
    decode_seconds: float
    """For all tokens after the first."""

    @property
    def tokens_per_second(self) -> float:
        """Rate of decoding; 0 if there was none."""
        return (len(self.tokens) - 1) / self.decode_seconds if len(self.tokens) > 1 else 0.0


@torch.no_grad()
def generate(
    model: GPTModel,
    prompt_ids,
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
    on_token: Callable[[int], object] | None = None,
) -> Generation:
    """Continues one prompt greedily, through Megatron's static inference context with its KV cache.

    Pipeline stages work on chunks of the prompt at the same time, and each knows every token that was made.

    prompt_ids: tokens as a sequence or a tensor of one prompt. Stops after `max_new_tokens`, or after a token of
    `eos_ids`. on_token is called with each new token; where it returns True, on all ranks, that token is the last.

    Raises ValueError for an empty prompt, tokens outside the vocabulary, or more tokens than the model's context holds;
    NotFiniteError for logits that are not finite.
    """
    ids = checked_prompt(model, prompt_ids, max_new_tokens)
    # Room for the tokens that fill up a last chunk under sequence parallelism.
    context = StaticInferenceContext(1, ids.shape[1] + max_new_tokens + _multiple(model))
    start = time.perf_counter()
    token = _next_token(model, context, ids, ids)
    first = time.perf_counter()
    context.enable_decode_mode()
    tokens = [token]
    ended = on_token is not None and on_token(token) is True
    while len(tokens) < max_new_tokens and token not in eos_ids and not ended:
        ids = F.pad(ids, (0, 1), value=token)
        token = _next_token(model, context, ids, ids[:, -1:])
        tokens.append(token)
        ended = on_token is not None and on_token(token) is True
    return Generation(tokens, first - start, time.perf_counter() - first)


def checked_prompt(model: GPTModel, prompt_ids, max_new_tokens: int) -> Tensor:
    """The prompt as a tensor [1, tokens] on the model's device. Raises what `generate` raises."""
    ids = torch.as_tensor(prompt_ids, dtype=torch.long, device=_device(model)).reshape(1, -1)
    length = ids.shape[1]
    if length < 1 or max_new_tokens < 1:
        raise ValueError(f"need at least one prompt token and one new token, got {length} and {max_new_tokens}")
    _check_ids(model, ids)
    if length + max_new_tokens > model.max_sequence_length:
        raise ValueError(
            f"prompt of {length} tokens and {max_new_tokens} new ones exceed the model's context of "
            f"{model.max_sequence_length} tokens"
        )
    return ids


@torch.no_grad()
def logits(model: GPTModel, ids: Tensor, gather: bool = False) -> Tensor | None:
    """What `differentiable_logits` gives, without gradients."""
    return differentiable_logits(model, ids, gather)


def differentiable_logits(model: GPTModel, ids: Tensor, gather: bool = False) -> Tensor | None:
    """Logits after every token, from one forward without cache; None in pipeline stages before the last.

    ids [b, s] -> [b, s, V_rank], this rank's part of the vocabulary, which begins at `vocab_start(model)`; with
    `gather` [b, s, V] on every rank of the stage. Entries that only pad the vocabulary to a multiple of the ranks are
    cut off, so the last rank's part may be narrower than the others'.

    Raises ValueError for tokens outside the vocabulary or more of them than the model's context holds, and
    NotFiniteError for logits that are not finite.
    """
    if ids.dim() != 2 or not ids.numel():
        raise ValueError(f"ids must have the shape [batch, tokens] and not be empty, got {list(ids.shape)}")
    ids = ids.to(_device(model))
    _check_ids(model, ids)
    length = ids.shape[1]
    if length > model.max_sequence_length:
        raise ValueError(f"{length} tokens exceed the model's context of {model.max_sequence_length} tokens")
    out = _read(model, ids, gather)
    if out is not None:
        out = out[..., : max(model.hf_config.vocab_size - (0 if gather else vocab_start(model)), 0)]
    finite.check(model, out, lambda: _read(model, ids))
    return out


def vocab_start(model: GPTModel) -> int:
    """The first entry of the vocabulary of which this rank has the logits, or would have them in the last stage."""
    return model.tp_group.rank() * (model.vocab_size // model.tp_group.size())


def _read(model: GPTModel, ids: Tensor, gather: bool = False) -> Tensor | None:
    """One forward without cache: `[b, s, V_rank]`, or V with `gather`, padded entries included."""
    length = ids.shape[1]
    # Tokens appended to the right change nothing before them: attention is causal.
    ids = F.pad(ids, (0, -length % _multiple(model)))
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    out = stages.forward(model, ids, positions, runtime_gather_output=gather)
    return None if out is None else out[:, :length]


def _next_token(model: GPTModel, context: StaticInferenceContext, text: Tensor, ids: Tensor) -> int:
    """Feeds ids [1, n] at the context's position and returns the most likely token after them. text: all so far."""
    n, multiple = ids.shape[1], _multiple(model)
    whole = n - n % multiple
    last = None
    for part in ids[:, :whole].split(chunk_tokens(whole, model.pp_group.size(), multiple), dim=1) if whole else ():
        last = _feed(model, context, part, -1)
        context.increment_sequence_len_offset(part.shape[1])
    if whole < n:
        # Sequence parallelism gives each rank the same number of tokens. The rest is filled up with tokens that are
        # not counted: nothing before them sees them, and the next tokens overwrite them in the cache.
        rest = n - whole
        context.materialize_only_last_token_logits = False
        last = _feed(model, context, F.pad(ids[:, whole:], (0, multiple - rest)), rest - 1)
        context.increment_sequence_len_offset(rest)
    token = stages.number_from_last(model, NOT_FINITE if last is None else _best(last, context.is_decode_only()))
    if token == NOT_FINITE:
        finite.fail(model, lambda: _read(model, text))
    return token


def _best(logits: Tensor, decodes: bool) -> int:
    """The most likely token; NOT_FINITE if logits are not finite.

    In decode, logits that are no candidates of a policy's are -inf: the largest one, which is NaN if any is, tells.
    """
    good = torch.isfinite(logits.max() if decodes else logits).all()
    return int(logits.argmax()) if good else NOT_FINITE


def _feed(model: GPTModel, context: StaticInferenceContext, ids: Tensor, place: int) -> Tensor | None:
    """Logits `[V]` after the token at `place` of ids [1, n], which stand at the context's position."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None] + context.sequence_len_offset
    out = stages.forward(model, ids, positions, inference_context=context, runtime_gather_output=True)
    return None if out is None else out[0, place, : model.hf_config.vocab_size]


def _multiple(model: GPTModel) -> int:
    """The number that a forward's tokens must be a multiple of."""
    return model.config.tensor_model_parallel_size if model.config.sequence_parallel else 1


def _device(model: GPTModel) -> torch.device:
    return next(model.parameters()).device


def _check_ids(model: GPTModel, ids: Tensor) -> None:
    low, high, vocabulary = int(ids.min()), int(ids.max()), model.hf_config.vocab_size
    if low < 0 or high >= vocabulary:  # a parallel embedding would take them for zeros
        raise ValueError(f"token {low if low < 0 else high} is outside the vocabulary of {vocabulary}")
