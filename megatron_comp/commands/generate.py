# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp generate`: text, and what it took."""

import argparse
from collections.abc import Callable
from pathlib import Path

from ..files import shown
from ..inference import config
from ..inference.text import check_prompt, encode, stop_tokens
from ..launcher import output
from ..launcher.progress import progress
from . import checks, setup

COLUMNS = {
    "codec": ("codec", ""),
    "tp": ("tensor-parallel ranks", "d"),
    "pp": ("pipeline stages", "d"),
    "prompt_tokens": ("prompt tokens", "d"),
    "new_tokens": ("new tokens", "d"),
    "ttft_ms": ("time to first token, ms", ".1f"),
    "decode_tokens_per_s": ("decode, tokens/s", ".1f"),
    "prefill_bytes_per_rank": ("bytes received per rank, prefill", ",d"),
    "decode_bytes_per_rank": ("bytes received per rank, decode", ",d"),
    "compressed_calls": ("compressed reductions", "d"),
    "kept_calls": ("uncompressed reductions", "d"),
}


def check(args: argparse.Namespace) -> list[setup.Setting]:
    if (args.codec is not None) + len(args.policy) > 1:
        raise ValueError("give one --codec or --policy, not both")
    checks.at_least_one(args, "new_tokens")
    if args.engine == "static" and len(args.prompt) > 1:
        raise ValueError("--engine static takes one --prompt; --engine dynamic takes several")
    if args.engine == "dynamic" and args.pp > 1:
        raise ValueError("--pp goes with --engine static")
    for prompt in args.prompt:
        check_prompt(prompt)
    checks.check_files(args)
    most = config.read_raw(Path(args.model)).get("max_position_embeddings")
    if isinstance(most, int) and args.new_tokens >= most:
        raise ValueError(f"--new-tokens {args.new_tokens}: {args.model} holds {most} tokens, the prompt's among them")
    return setup.settings(args, [] if args.codec is None else [args.codec]) or [setup.NONE]


def run(args: argparse.Namespace) -> None:
    (setting,) = check(args)
    with setup.opened(args) as (model, tokenizer):
        if overrides := setup.overrides(args, model, [setting]):
            overrides.use(overrides.blocks_for(setting.policy))
        prompts = [encode(tokenizer, prompt, args.chat) for prompt in args.prompt]
        if not all(prompts):
            raise ValueError(f"--prompt {shown(args.prompt[prompts.index([])])}: this tokenizer makes no token of it")
        stops = stop_tokens(args.model, model.hf_config, tokenizer)
        row = generate_row(model, tokenizer, setting, prompts, args.new_tokens, stops, args.engine)
    if output.is_first_rank():
        output.say(row["text"] + "\n")
        output.show_one("generate", COLUMNS, row)
        output.write_json(args.json, vars(args), [row])


def generate_row(
    model,
    tokenizer,
    setting: setup.Setting,
    prompts: list[list[int]],
    max_new_tokens: int,
    stops: set[int],
    engine: str = "static",
) -> dict:
    """Generates two tokens to warm up prefill and decode, and then to measure. prompts: their tokens; stops: those
    that end a text."""
    from ..inference.generate import checked_prompt
    from ..inference.stages import stats_of_all
    from ..layers.apply import apply_compression, stats

    for ids in prompts:
        checked_prompt(model, ids, max_new_tokens)
    apply_compression(model, setting.policy)
    _generate(engine, model, prompts, min(2, max_new_tokens), stops, lambda: None)
    apply_compression(model, setting.policy)  # counters start again

    prefill = None
    with progress(total=max_new_tokens, desc=f"generate {setting.name}") as bar:

        def on_step() -> None:
            nonlocal prefill
            if prefill is None:  # once: walking the model for every token would slow what is being timed
                prefill = stats(model)
            bar.update()

        made, ttft_seconds, decode_seconds = _generate(engine, model, prompts, max_new_tokens, stops, on_step)
    prompt_tokens, decoded = sum(map(len, prompts)), sum(map(len, made)) - len(made)
    _, prefill_bytes = stats_of_all(model, prefill, prompt_tokens)
    after, all_bytes = stats_of_all(model, stats(model), prompt_tokens + decoded)
    return {
        "codec": setting.name,
        "tp": model.config.tensor_model_parallel_size,
        "pp": model.config.pipeline_model_parallel_size,
        "prompt_tokens": prompt_tokens,
        "new_tokens": sum(map(len, made)),
        "ttft_ms": ttft_seconds * 1e3,
        "decode_tokens_per_s": decoded / decode_seconds if decoded else 0.0,
        "prefill_bytes_per_rank": prefill_bytes,
        "decode_bytes_per_rank": all_bytes - prefill_bytes,
        "compressed_calls": after.compressed.calls,
        "kept_calls": after.kept.calls,
        "kept_because": dict(after.kept_because),
        # Decoded as one: some tokenizers drop a space at the start of what they decode.
        "text": "\n\n".join(
            tokenizer.decode([*ids, *tokens], skip_special_tokens=True) for ids, tokens in zip(prompts, made)
        ),
    }


def _generate(
    engine: str,
    model,
    prompts: list[list[int]],
    max_new_tokens: int,
    stops: set[int],
    on_step: Callable[[], None],
) -> tuple[list[list[int]], float, float]:
    """New tokens of each prompt, seconds to the first of them, and seconds after it."""
    if engine == "dynamic":
        from ..inference.dynamic import generate_together

        together = generate_together(model, prompts, max_new_tokens, stops, on_step)
        return together.tokens, together.ttft_seconds, together.decode_seconds
    from ..inference.generate import generate

    made = generate(model, prompts[0], max_new_tokens, stops, lambda _token: on_step())
    return [made.tokens], made.ttft_seconds, made.decode_seconds
