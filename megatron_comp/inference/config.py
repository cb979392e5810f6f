# SPDX-License-Identifier: Apache-2.0
"""What the config.json of a Llama or Mixtral may say: which keys count, what they may hold, what is refused.

Knows JSON alone, so that a command can check a folder before it imports torch or starts a rank.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from textwrap import shorten
from types import SimpleNamespace
from typing import NamedTuple

from .. import files
from ..files import shown
from .model_files import check_file, quantized

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM"}  # model_type -> architecture
ROPE_TYPES = ("default", "linear", "llama3")
ACTIVATIONS = ("silu", "swish")  # two names of one function
DTYPES = ("float32", "float16", "bfloat16", "float64")


class Rule(NamedTuple):
    """What a value may be: in words, and as a test."""

    allowed: str
    holds: Callable[[object], bool]

    def or_null(self) -> "Rule":
        return Rule(f"{self.allowed}, or null", lambda value: value is None or self.holds(value))


def _is_integer(value: object) -> bool:
    return type(value) is int


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _one_of(*words: str) -> Rule:
    return Rule(" or ".join(map(repr, words)), lambda value: value in words)


COUNT = Rule("an integer of at least 1", lambda value: _is_integer(value) and value >= 1)
EVEN = Rule("an even integer of at least 2", lambda value: _is_integer(value) and value >= 2 and value % 2 == 0)
POSITIVE = Rule("a number above 0", lambda value: _is_number(value) and value > 0)
# transformers takes no integer for it.
EPSILON = Rule(
    "a number of at least 0, written with a point or an exponent",
    lambda value: type(value) is float and math.isfinite(value) and value >= 0,
)
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
TOKEN = Rule("a token's number", _is_integer).or_null()
TOKENS = Rule(
    "a token's number or a list of them",
    lambda value: _is_integer(value) or (isinstance(value, list) and all(map(_is_integer, value))),
).or_null()
MAPPING = Rule("an object", lambda value: isinstance(value, Mapping)).or_null()

# The model is built as these say.
USED = {
    "vocab_size": COUNT,
    "hidden_size": COUNT,
    "intermediate_size": COUNT,
    "num_hidden_layers": COUNT,
    "num_attention_heads": COUNT,
    "num_key_value_heads": COUNT.or_null(),
    "head_dim": EVEN.or_null(),
    "hidden_act": _one_of(*ACTIVATIONS),
    "max_position_embeddings": COUNT,
    "rms_norm_eps": EPSILON,
    "tie_word_embeddings": FLAG,
    "rope_parameters": MAPPING,
    "rope_scaling": MAPPING,  # its older name
    "rope_theta": POSITIVE,  # where files of transformers 4 have it
    "num_local_experts": COUNT,
    "num_experts": COUNT,  # transformers takes it for num_local_experts
    "num_experts_per_tok": COUNT,
    "dtype": _one_of(*DTYPES).or_null(),
    "torch_dtype": _one_of(*DTYPES).or_null(),  # its older name
    "bos_token_id": TOKEN,
    "eos_token_id": TOKENS,
}

# Keys inside of `rope_parameters`.
ROPE_USED = {
    "rope_theta": POSITIVE,
    "factor": POSITIVE,
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "original_max_position_embeddings": COUNT,
}
ROPE_NEEDED = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}


class Refusal(NamedTuple):
    """The values that ask for nothing, and why others are refused."""

    harmless: Callable[[object], bool]
    why: str


def _absent(*values: object) -> Callable[[object], bool]:
    return lambda value: value is None or any(value is each for each in values)


# Each of these would change what the model computes.
REFUSED = {
    "attention_bias": Refusal(_absent(False), "only models without biases are supported"),
    "mlp_bias": Refusal(_absent(False), "only models without biases are supported"),
    "sliding_window": Refusal(_absent(), "only null is supported: each token sees all before it"),
    "is_causal": Refusal(lambda value: value is True, "only true is supported: a token sees none after it"),
    "is_encoder_decoder": Refusal(_absent(False), "only false is supported"),
    "partial_rotary_factor": Refusal(lambda value: value is None or value == 1, "only 1.0 is supported"),
    "per_layer_config": Refusal(lambda value: not value, "only layers that are all alike are supported"),
    "layer_types": Refusal(
        lambda value: value is None or (isinstance(value, list) and all(each == "full_attention" for each in value)),
        "only 'full_attention' is supported",
    ),
}
QUANTIZATION = ("quantization_config", "compression_config")

# Nothing that a model computes from tokens to logits depends on these.
WITHOUT_EFFECT = {
    # What it is for, and how it was made and saved.
    *("model_type", "architectures", "auto_map", "custom_pipelines", "name_or_path", "_name_or_path", "_commit_hash"),
    "_model_name_or_path",
    *("transformers_version", "unsloth_version", "unsloth_fixed", "mlx_lm_version", "tokenizer_class", "is_decoder"),
    *("finetuning_task", "task_specific_params", "base_model", "license", "language", "model_max_length"),
    # Of training.
    *("initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "dropout"),
    *("router_jitter_noise", "router_aux_loss_coef", "gradient_checkpointing", "neftune_noise_alpha"),
    # What a forward returns beside logits, and how it gets there.
    *("use_cache", "output_hidden_states", "output_attentions", "output_router_logits", "return_dict"),
    *("tie_last_hidden_states", "torchscript", "chunk_size_feed_forward", "pretraining_tp"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
    # Of other heads than the language model's.
    *("id2label", "label2id", "num_labels", "problem_type", "pad_token_id", "sep_token_id", "unk_token_id"),
    *("cross_attention_hidden_size", "add_cross_attention", "tie_encoder_decoder", "pruned_heads", "use_bfloat16"),
    # transformers reads it inside of rope_parameters only.
    "original_max_position_embeddings",
    "transformers.js_config",
}


def read_raw(model_dir: str | Path) -> dict:
    """What config.json says, checked by itself: an architecture that is built here, no key that asks for more, values
    of the right kind and in range.

    Raises ValueError that names file, key, value and what is allowed.
    """
    path = Path(model_dir) / "config.json"
    if not path.is_file() and not path.is_symlink():
        raise ValueError(f"{path} is missing: expected the folder of a Hugging Face checkpoint")
    raw = read_json(path)
    model_type, architectures = raw.get("model_type"), raw.get("architectures") or []
    architectures = architectures if isinstance(architectures, list) else [architectures]
    expected = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if expected is None or (architectures and expected not in architectures):
        allowed = ", ".join(f"{a} (model_type {t})" for t, a in ARCHITECTURES.items())
        given = f"{', '.join(map(str, architectures)) or 'no architecture'} (model_type {model_type})"
        raise ValueError(f"{path}: {given} is not supported; allowed: {allowed}")
    for key in QUANTIZATION:
        if raw.get(key) is not None:
            raise ValueError(f"{path}: {key}: {quantized(raw[key])}")
    for key, value in raw.items():
        if key in USED:
            _check(path, key, value, USED[key])
        elif key in REFUSED and not REFUSED[key].harmless(value):
            raise ValueError(f"{path}: {key} is {_as_json(value)}; {REFUSED[key].why}")
    _check_rope(raw, path)
    if (found := sizes(raw)) is not None:
        check_sizes(found, path)
    return raw


def read_json(path: Path) -> dict:
    """A JSON object. Raises FileNotFoundError or ValueError that names the file."""
    check_file(path)
    content = files.read_json(path, "file")
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def unknown_keys(raw: Mapping, known: Iterable[str] = ()) -> list[str]:
    """Keys that ask for something of which nothing is known here. known: further keys without effect."""
    given = [*raw, *(f"{name}.{key}" for name in ("rope_parameters", "rope_scaling") for key in raw.get(name) or ())]
    listed = {*USED, *REFUSED, *QUANTIZATION, *WITHOUT_EFFECT, *known}
    inside = {"type", "rope_type", "partial_rotary_factor", *ROPE_USED}
    for name in ("rope_parameters", "rope_scaling"):
        listed |= {f"{name}.{key}" for key in inside}
    return [key for key in given if key not in listed and (raw.get(key, True) not in (None, False))]


def check_sizes(config, path: Path) -> None:
    """Raises ValueError for sizes that do not go together. config: has them as attributes."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise ValueError(f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    if config.model_type == "mixtral" and config.num_experts_per_tok > config.num_local_experts:
        chosen, count = config.num_experts_per_tok, config.num_local_experts
        raise ValueError(f"{path}: num_experts_per_tok is {chosen}; allowed: 1 to num_local_experts, {count}")
    if not config.head_dim and (config.hidden_size % heads or config.hidden_size // heads % 2):
        raise ValueError(
            f"{path}: hidden_size {config.hidden_size} is not an even multiple of num_attention_heads {heads}, and "
            "there is no head_dim"
        )


def sizes(raw: Mapping) -> SimpleNamespace | None:
    """What weights' sizes, and splitting them over ranks, depend on; None where config.json leaves some of it to
    transformers."""
    heads = raw.get("num_attention_heads")
    given = {
        "model_type": raw["model_type"],
        "hidden_size": raw.get("hidden_size"),
        "intermediate_size": raw.get("intermediate_size"),
        "num_hidden_layers": raw.get("num_hidden_layers"),
        "vocab_size": raw.get("vocab_size"),
        "num_attention_heads": heads,
        # transformers' own default for a Mixtral is 8, for a Llama the number of heads.
        "num_key_value_heads": raw.get("num_key_value_heads", None if raw["model_type"] == "llama" else 8) or heads,
    }
    if raw["model_type"] == "mixtral":
        given["num_local_experts"] = raw.get("num_experts", raw.get("num_local_experts", 8))
        given["num_experts_per_tok"] = raw.get("num_experts_per_tok", 2)
    rest = {"head_dim": raw.get("head_dim"), "tie_word_embeddings": raw.get("tie_word_embeddings", False)}
    return SimpleNamespace(**rest, **given) if all(given.values()) else None


def _check(path: Path, key: str, value: object, rule: Rule) -> None:
    if not rule.holds(value):
        raise ValueError(f"{path}: {key} is {_as_json(value)}; allowed: {rule.allowed}")


def _check_rope(raw: Mapping, path: Path) -> None:
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"  # transformers prefers the older name
    rope = raw.get(name) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"{path}: {name}: rope type {shown(kind)} is not supported; allowed: {', '.join(ROPE_TYPES)}")
    for key, value in rope.items():
        if key in ROPE_USED:
            _check(path, f"{name}: {key}", value, ROPE_USED[key])
    if not REFUSED["partial_rotary_factor"].harmless(rope.get("partial_rotary_factor")):
        given, why = rope["partial_rotary_factor"], REFUSED["partial_rotary_factor"].why
        raise ValueError(f"{path}: {name}: partial_rotary_factor is {_as_json(given)}; {why}")
    if missing := [key for key in ROPE_NEEDED[kind] if key not in rope]:
        raise ValueError(f"{path}: {name}: rope type '{kind}' needs {missing[0]}, which is missing")
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        raise ValueError(f"{path}: {name}: high_freq_factor is {high}; allowed: a number above low_freq_factor, {low}")


def _as_json(value: object) -> str:
    """As the file has it, cut; text in quotes."""
    return shown(value) if isinstance(value, str) else shorten(json.dumps(value), 80, placeholder="...")
