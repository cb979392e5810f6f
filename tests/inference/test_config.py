# SPDX-License-Identifier: Apache-2.0
"""Every field of transformers' Llama and Mixtral configs: computed as transformers does, refused, or without effect."""

import json
import math
import shutil
from dataclasses import fields

import pytest
import torch
from checkpoints import tiny_llama, tiny_mixtral
from ranks import run_ranks
from transformers import GenerationConfig, LlamaConfig, MixtralConfig

from megatron_comp.inference import config as rules
from megatron_comp.inference import hf
from megatron_comp.notices import Notice

MAKERS = {"llama": tiny_llama, "mixtral": tiny_mixtral}
CONFIGS = {"llama": LlamaConfig, "mixtral": MixtralConfig}
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# Checkpoints made with a value: their logits equal transformers'.
MADE = [
    *(("vocab_size", 61), ("hidden_size", 32), ("intermediate_size", 40), ("num_hidden_layers", 1), ("head_dim", 32)),
    *(("num_attention_heads", 8), ("num_key_value_heads", 1), ("num_key_value_heads", 4), ("hidden_act", "swish")),
    *(("max_position_embeddings", 40), ("rms_norm_eps", 0.03), ("rms_norm_eps", 0.0), ("tie_word_embeddings", True)),
    *(("rope_parameters", LINEAR), ("rope_parameters", {**LLAMA3, "original_max_position_embeddings": 16})),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 100}),
]
OF_EXPERTS = [("num_local_experts", 3), *(("num_experts_per_tok", chosen) for chosen in (1, 3, 4))]

# Values written into a checkpoint's config.json that change nothing, or change it as transformers has it.
WRITTEN = [
    *(
        ("rope_theta", 500),
        ("rope_theta", 123.5),
        ("rope_scaling", {"type": "linear", "factor": 2}),
        ("rope_scaling", {}),
    ),
    *(("rope_scaling", LLAMA3), ("rope_scaling", None), ("dtype", "bfloat16"), ("torch_dtype", "float16")),
    *(("attention_dropout", 0.5), ("initializer_range", 1.0), ("use_cache", False), ("output_hidden_states", True)),
    *(("output_attentions", True), ("attn_implementation", "eager"), ("experts_implementation", "eager")),
    *(("chunk_size_feed_forward", 4), ("pretraining_tp", 2), ("router_jitter_noise", 0.5), ("is_decoder", True)),
    *(("output_router_logits", True), ("router_aux_loss_coef", 1.0), ("tie_last_hidden_states", True)),
    *(("id2label", {"0": "a"}), ("label2id", {"a": 0}), ("problem_type", "regression"), ("pad_token_id", 5)),
    *(("bos_token_id", 7), ("eos_token_id", [1, 2]), ("transformers_version", "4.0"), ("architectures", None)),
    *(
        ("layer_types", ["full_attention"] * 2),
        ("is_causal", True),
        ("sliding_window", None),
        ("attention_bias", False),
    ),
    *(("original_max_position_embeddings", 8), ("temperature", 0.1), ("return_dict", True), ("per_layer_config", {})),
]

# Values that are refused, and what is said of them behind the file's name.
NUMBER, COUNT = "allowed: a number above 0", "allowed: an integer of at least 1"
REFUSED = [
    ("attention_bias", True, "attention_bias is true; only models without biases"),
    ("mlp_bias", True, "mlp_bias is true; only models without biases"),
    ("sliding_window", 8, "sliding_window is 8; only null"),
    ("is_causal", False, "is_causal is false; only true"),
    ("is_encoder_decoder", True, "is_encoder_decoder is true; only false"),
    ("per_layer_config", {"1": {"rms_norm_eps": 0.1}}, 'per_layer_config is {"1": '),
    ("layer_types", ["full_attention", "sliding_attention"], "layer_types is "),
    ("partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5; only 1.0"),
    (
        "rope_parameters",
        {**LINEAR, "partial_rotary_factor": 0.5},
        "rope_parameters: partial_rotary_factor is 0.5; only",
    ),
    ("hidden_act", "gelu", "hidden_act is 'gelu'; allowed: 'silu' or 'swish'"),
    ("hidden_act", None, "hidden_act is null; allowed: 'silu'"),
    ("rope_theta", "500000", f"rope_theta is '500000'; {NUMBER}"),
    ("rope_theta", 0, f"rope_theta is 0; {NUMBER}"),
    ("rope_theta", math.inf, f"rope_theta is Infinity; {NUMBER}"),
    ("rope_theta", True, f"rope_theta is true; {NUMBER}"),
    ("rope_parameters", {"rope_theta": "1e4"}, f"rope_parameters: rope_theta is '1e4'; {NUMBER}"),
    ("rope_scaling", {"type": "linear", "factor": "4"}, f"rope_scaling: factor is '4'; {NUMBER}"),
    ("rope_scaling", {"type": "linear", "factor": 0}, f"rope_scaling: factor is 0; {NUMBER}"),
    ("rope_scaling", {"type": "linear"}, "rope_scaling: rope type 'linear' needs factor"),
    ("rope_scaling", {"rope_type": "llama3", "factor": 2.0}, "rope type 'llama3' needs low_freq_factor"),
    ("rope_scaling", {**LLAMA3, "low_freq_factor": 4.0}, "high_freq_factor is 4.0; allowed: a number above low_freq"),
    ("rope_scaling", {**LLAMA3, "original_max_position_embeddings": "8"}, f"embeddings is '8'; {COUNT}"),
    ("rope_scaling", [1], "rope_scaling is [1]; allowed: an object"),
    *(
        (
            "rope_scaling",
            {"rope_type": kind, "factor": 2.0},
            f"rope type '{kind}' is not supported; allowed: default, li",
        )
        for kind in ("dynamic", "yarn", "longrope", "proportional", "odd")
    ),
    *(
        (key, value, f"{key} is {json.dumps(value) if not isinstance(value, str) else repr(value)}; {COUNT}")
        for key in ("num_attention_heads", "num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size")
        for value in (0, -4, "4", 4.0, True, None)
    ),
    ("num_key_value_heads", 0, f"num_key_value_heads is 0; {COUNT}"),
    ("num_key_value_heads", 3, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ("max_position_embeddings", "64", f"max_position_embeddings is '64'; {COUNT}"),
    ("head_dim", 0, "head_dim is 0; allowed: an even integer of at least 2"),
    ("head_dim", 15, "head_dim is 15; allowed: an even integer"),
    ("rms_norm_eps", "1e-5", "rms_norm_eps is '1e-5'; allowed: a number of at least 0"),
    ("rms_norm_eps", 0, "rms_norm_eps is 0; allowed: a number of at least 0, written with a point or an exponent"),
    ("rms_norm_eps", -1e-5, "rms_norm_eps is -1e-05; allowed: a number of at least 0"),
    ("tie_word_embeddings", "true", "tie_word_embeddings is 'true'; allowed: true or false"),
    ("dtype", "int8", "dtype is 'int8'; allowed: 'float32'"),
    ("eos_token_id", "2", "eos_token_id is '2'; allowed: a token's number or a list"),
    ("eos_token_id", [1, "2"], 'eos_token_id is [1, "2"]; allowed: a token'),
    ("quantization_config", {"quant_method": "fp8"}, "quantization_config: the weights are quantized by fp8;"),
    ("quantization_config", {"load_in_8bit": True}, "quantized by bitsandbytes (load_in_8bit)"),
    ("quantization_config", {}, "quantized by an unnamed method"),
    (
        "compression_config",
        {"format": "int-quantized"},
        "compression_config: the weights are quantized by int-quantized",
    ),
    ("architectures", 3, "3 (model_type "),
]
REFUSED_OF_EXPERTS = [
    ("num_experts_per_tok", 5, "num_experts_per_tok is 5; allowed: 1 to num_local_experts, 4"),
    ("num_experts_per_tok", 0, f"num_experts_per_tok is 0; {COUNT}"),
    ("num_local_experts", "4", f"num_local_experts is '4'; {COUNT}"),
    ("num_experts", 1, "num_experts_per_tok is 2; allowed: 1 to num_local_experts, 1"),
]


def write(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("configs")
    return {name: make(base / name, **SMALL) for name, make in MAKERS.items()}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_field_is_in_one_list(family):
    """A field that a new version of transformers brings fails here by its name, until somebody says what it does."""
    config = CONFIGS[family]
    names = {field.name for field in fields(config)} | set(config().to_dict()) - set(GenerationConfig().to_dict())
    lists = [set(rules.USED), set(rules.REFUSED), set(rules.QUANTIZATION), set(rules.WITHOUT_EFFECT)]
    found = {name: sum(name in each for each in lists) for name in names}
    assert {name: count for name, count in found.items() if count != 1} == {}
    assert sum(map(len, lists)) == len(set().union(*lists))


def test_every_field_that_counts_is_tried():
    tried = {key for key, *_ in (*MADE, *OF_EXPERTS, *WRITTEN, *REFUSED, *REFUSED_OF_EXPERTS)}
    assert {*rules.USED, *rules.REFUSED, *rules.QUANTIZATION} - tried == set()


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_built_computes_what_transformers_does(folders, family, tmp_path):
    cases = {}
    for number, (key, value) in enumerate([*MADE, *(OF_EXPERTS if family == "mixtral" else [])]):
        cases[f"{key}: {value}"] = MAKERS[family](tmp_path / f"made{number}", **{**SMALL, key: value})
    for number, (key, value) in enumerate(WRITTEN):
        folder = shutil.copytree(folders[family], tmp_path / f"written{number}")
        cases[f"written {key}: {value}"] = write(folder, **{key: value})
    if family == "llama":  # with key-value heads left out or null: as many as heads
        cases["no groups"] = write(
            tiny_llama(tmp_path / "none", **{**SMALL, "num_key_value_heads": 4}), num_key_value_heads=None
        )
    (differences,) = run_ranks(differences_of, 1, cases)
    assert {name: said for name, said in differences.items() if not said < 1e-4} == {}


@torch.no_grad()
def differences_of(rank, world_size, folders):
    """The largest difference of logits from transformers', or what was said."""
    from transformers import AutoModelForCausalLM

    from megatron_comp.inference.generate import logits
    from megatron_comp.inference.model import build_model, init_parallel

    init_parallel(world_size)
    ids = torch.randint(0, 61, (2, 33), generator=torch.Generator().manual_seed(5))
    made = {}
    for name, folder in folders.items():
        try:
            ours = logits(build_model(folder), ids, gather=True)
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
            made[name] = (ours - theirs).abs().max().item()
        except Exception as error:
            made[name] = math.inf
            print(name, repr(error))
    return made


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_not_built_is_refused(folders, family, tmp_path):
    """By rules that need no transformers: the same ones that are asked before ranks start."""
    folder = shutil.copytree(folders[family], tmp_path / family)
    text = (folder / "config.json").read_text()
    for key, value, message in [*REFUSED, *(REFUSED_OF_EXPERTS if family == "mixtral" else [])]:
        (folder / "config.json").write_text(text)
        write(folder, **{key: value})
        for read in (rules.read_raw, hf.read_config):
            with pytest.raises(ValueError) as error:
                read(folder)
            assert str(error.value).startswith(f"{folder}/config.json: ") and message in str(error.value)


def test_keys_that_nobody_knows_are_named_once(folders, tmp_path, recwarn):
    folder = write(shutil.copytree(folders["llama"], tmp_path / "model"), query_scale=0.5, new_switch=False, older=None)
    write(folder, rope_scaling={"type": "linear", "factor": 2.0, "offset": 3})
    hf.read_config(folder)
    (said,) = [str(each.message) for each in recwarn if issubclass(each.category, Notice)]
    assert said == f"{folder}/config.json: unknown keys, which have no effect here: query_scale, rope_scaling.offset"
