# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a file are used: an output layer beside a tied flag, and what quantized files are told."""

import json
import shutil

import pytest
import torch
from checkpoints import tiny_llama, tiny_mixtral
from models import message_of
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from megatron_comp.inference import hf, model_files
from megatron_comp.inference.generate import logits
from megatron_comp.inference.model import build_model, destroy_parallel, init_parallel
from megatron_comp.notices import Notice

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SMALL = {"num_hidden_layers": 2, "vocab_size": 131}


def rewrite(folder, change, **config):
    file, path = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def copy_head(tensors):
    tensors[HEAD] = tensors[EMBEDDING].clone()


def one_value(tensors):
    copy_head(tensors)
    tensors[HEAD][-1, -1] += 3


def no_embedding(tensors):
    tensors[HEAD] = tensors.pop(EMBEDDING)


def another_type(tensors):
    """Rounded, it differs."""
    tensors[HEAD] = tensors[EMBEDDING].bfloat16()


# What lies in a file whose config ties the output layer to the embedding, and whether a line tells of it.
HEADS = {
    "none": (lambda tensors: None, False),
    "another": (lambda tensors: tensors.update({HEAD: torch.randn(131, 96)}), True),
    "one value": (one_value, True),
    "rounded": (another_type, True),
    "a copy": (copy_head, False),
    "no embedding": (no_embedding, False),
}


@torch.no_grad()
def against_transformers(rank, world_size, folders):
    from transformers import AutoModelForCausalLM

    init_parallel(world_size)
    ids = torch.randint(0, 131, (2, 21), generator=torch.Generator().manual_seed(3))
    theirs = {
        name: AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits for name, f in folders.items()
    }
    return {
        name: (logits(build_model(f), ids, gather=True) - theirs[name]).abs().max().item()
        for name, f in folders.items()
    }


@pytest.mark.parametrize("tp", [1, 2])
def test_the_files_own_head_is_used(tmp_path, recwarn, tp):
    folders = {}
    for make in (tiny_llama, tiny_mixtral):
        source = make(tmp_path / make.__name__, tie_word_embeddings=True, **SMALL)
        for name, (change, _) in HEADS.items():
            key = f"{make.__name__} {name}"
            folders[key] = rewrite(shutil.copytree(source, tmp_path / key.replace(" ", "_")), change)
    for differences in run_ranks(against_transformers, tp, folders):
        assert {name: difference for name, difference in differences.items() if difference >= 1e-4} == {}
    recwarn.clear()
    for name, folder in folders.items():
        hf.read_config(folder)
        told = [str(each.message) for each in recwarn if issubclass(each.category, Notice)]
        assert (len(told) == 1 and "tie_word_embeddings is true, but" in told[0]) is HEADS[name.partition(" ")[2]][1], (
            name
        )
        recwarn.clear()


def converted(rank, world_size, folder, out):
    """What `convert` makes of a file with a head of its own, under its config: the same logits."""
    from megatron_comp.commands.convert import convert

    init_parallel(world_size)
    convert(str(folder), out, "auto")
    ids = torch.arange(2, 22)[None]
    expected, made = (logits(build_model(each), ids, gather=True) for each in (folder, out))
    destroy_parallel()
    return (made - expected).abs().max().item()


def test_convert_keeps_the_files_own_head(tmp_path):
    folder = rewrite(tiny_llama(tmp_path / "model", tie_word_embeddings=True, **SMALL), HEADS["another"][0])
    for difference in run_ranks(converted, 2, folder, tmp_path / "out"):
        assert difference < 1e-5


PROJECTION = "model.layers.0.self_attn.q_proj"


def quantize(*parts, dtype=torch.int32):
    """Tensors beside or instead of a projection's weight."""

    def change(tensors):
        if "weight" not in parts:
            tensors.pop(PROJECTION + ".weight", None)
        for part in parts:
            tensors[f"{PROJECTION}.{part}"] = torch.ones(96, 96).to(dtype if part == "weight" else torch.int32)

    return change


QUANTIZED = {
    "GPTQ": (quantize("qweight", "qzeros", "scales", "g_idx"), "GPTQ"),
    "AWQ": (quantize("qweight", "qzeros", "scales"), "AWQ"),
    "fp8 blocks": (quantize("weight", "weight_scale_inv", dtype=torch.float8_e4m3fn), "fp8"),
    "fp8": (quantize("weight", "weight_scale", dtype=torch.float8_e4m3fn), "fp8"),
    "compressed-tensors": (quantize("weight_packed", "weight_scale", "weight_shape"), "compressed-tensors"),
    "bitsandbytes 8": (quantize("weight", "SCB", dtype=torch.int8), "bitsandbytes"),
    "bitsandbytes 4": (quantize("weight", "weight.absmax", "weight.quant_map", dtype=torch.uint8), "bitsandbytes"),
    "modelopt": (quantize("weight", "weight_scale_2", dtype=torch.uint8), "modelopt"),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_tensors_are_named_as_such(tmp_path, kind):
    """Whether config.json tells of them or not, and before any rank starts."""
    change, method = QUANTIZED[kind]
    folder = rewrite(tiny_llama(tmp_path / "model", **SMALL), change)
    (said,) = run_ranks(what_it_says, 1, folder)
    for message in (said, message_of(model_files.check_weights, folder)):
        assert "model.layers.0.self_attn.q_proj" in message and "the weights are quantized by" in message, message
        assert method in message and "only weights in 16, 32 or 64 bits" in message, message
    rewrite(folder, lambda tensors: None, quantization_config={"quant_method": "awq"})
    assert "quantization_config: the weights are quantized by awq" in message_of(hf.read_config, folder)


def what_it_says(rank, world_size, folder):
    init_parallel(world_size)
    return message_of(build_model, folder)


def test_floats_of_eight_bits_without_scales(tmp_path):
    folder = rewrite(tiny_llama(tmp_path / "model", **SMALL), quantize("weight", dtype=torch.float8_e5m2))
    (said,) = run_ranks(what_it_says, 1, folder)
    assert "q_proj.weight is of type F8_E5M2, expected one of F16, BF16, F32, F64; quantized weights" in said
