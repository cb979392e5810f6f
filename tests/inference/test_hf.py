# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders: which rows and columns a rank takes, that it reads no others, and what bad folders say."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from checkpoints import tiny_llama
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from megatron_comp.inference import hf, shards


def tensors_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def fill(folder, rank, tp):
    """This rank's parameters, loaded into a stand-in of the model's shapes."""
    config = hf.read_config(folder)
    parameters = {}
    for name, pieces in shards.plan(config, shards.Share(rank, tp)).items():
        shape = [sum(p.rows[1] - p.rows[0] for p in pieces)]
        if "norm" not in name:
            shape.append(pieces[0].columns[1] - pieces[0].columns[0])
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            shape[0] = shards.padded_vocab_size(config, tp) // tp
        parameters[name] = torch.full(shape, float("nan"))
    model = SimpleNamespace(named_parameters=parameters.items)
    hf.load_weights(model, folder, config, shards.Share(rank, tp))
    return parameters


SPLITS = [("llama2", 1), ("llama2", 4), ("llama3", 3), ("two_groups", 4), ("two_groups", 8), ("one_group", 3)]


@pytest.mark.parametrize("name, tp", SPLITS)
def test_ranks_together_hold_the_checkpoint(tiny, name, tp):
    folder = tiny[name].folder
    config, theirs = hf.read_config(folder), tensors_of(folder)
    ranks = [fill(folder, rank, tp) for rank in range(tp)]

    def whole(parameter, dim):
        return torch.cat([rank[parameter] for rank in ranks], dim)

    embedding = whole("embedding.word_embeddings.weight", 0)
    assert torch.equal(embedding[: config.vocab_size], theirs["model.embed_tokens.weight"])
    assert not embedding[config.vocab_size :].any()
    assert ("output_layer.weight" in ranks[0]) is not config.tie_word_embeddings
    dim, groups = shards.head_dim(config), config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        ours, hugging_face = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        q, k, v = (theirs[f"{hugging_face}self_attn.{part}_proj.weight"] for part in "qkv")
        by_group = [x.reshape(groups, -1, config.hidden_size) for x in (q, k, v)]
        assert by_group[1].shape[1] == dim
        assert torch.equal(whole(ours + "self_attention.linear_qkv.weight", 0), torch.cat(by_group, 1).flatten(0, 1))
        o_proj = theirs[hugging_face + "self_attn.o_proj.weight"]
        assert torch.equal(whole(ours + "self_attention.linear_proj.weight", 1), o_proj)
        gates, ups = zip(*(rank[ours + "mlp.linear_fc1.weight"].chunk(2) for rank in ranks))
        assert torch.equal(torch.cat(gates), theirs[hugging_face + "mlp.gate_proj.weight"])
        assert torch.equal(torch.cat(ups), theirs[hugging_face + "mlp.up_proj.weight"])
        assert torch.equal(whole(ours + "mlp.linear_fc2.weight", 1), theirs[hugging_face + "mlp.down_proj.weight"])
        for rank in ranks:
            norm = rank[ours + "pre_mlp_layernorm.weight"]
            assert torch.equal(norm, theirs[hugging_face + "post_attention_layernorm.weight"])


class CountingFile:
    """A safetensors file that notes the bytes of every slice taken, and has no way to read a tensor whole."""

    def __init__(self, file, counts):
        self.keys, self._file, self._counts = file.keys, file, counts

    def get_slice(self, name):
        block, counts = self._file.get_slice(name), self._counts

        class Slice:
            get_shape, get_dtype = block.get_shape, block.get_dtype

            def __getitem__(self, index):
                part = block[index]
                counts[name] = counts.get(name, 0) + part.nbytes
                return part

        return Slice()


@pytest.mark.parametrize("name, tp", SPLITS)
def test_a_rank_reads_its_slices_and_no_more(tiny, monkeypatch, name, tp):
    counts, real = {}, hf.safe_open
    monkeypatch.setattr(hf, "safe_open", lambda *args, **kwargs: CountingFile(real(*args, **kwargs), counts))
    theirs = tensors_of(tiny[name].folder)
    total = dict.fromkeys(theirs, 0)
    for rank in range(tp):
        counts.clear()
        parameters = fill(tiny[name].folder, rank, tp)
        assert sum(counts.values()) <= sum(p.nbytes for p in parameters.values())
        for tensor, count in counts.items():
            total[tensor] += count
    for tensor, count in total.items():
        assert count == theirs[tensor].nbytes * (tp if "norm" in tensor else 1), tensor


def test_shards_are_opened_only_when_needed(tiny, monkeypatch):
    opened, real = [], hf.safe_open
    monkeypatch.setattr(hf, "safe_open", lambda path, **kwargs: opened.append(path.name) or real(path, **kwargs))
    checkpoint = hf.Checkpoint(tiny["llama3"].folder)
    assert opened == [] and len(set(checkpoint._file_of.values())) > 3
    checkpoint.read(shards.Piece("model.norm.weight", (96,), (0, 96)))
    checkpoint.read(shards.Piece("model.norm.weight", (96,), (0, 96)))
    assert len(opened) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM .*LlamaForCausalLM"),
        ({"model_type": "bert", "architectures": None}, "no architecture .model_type bert. is not supported; allowed"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; allowed: 'silu'"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "'yarn' .*default, linear, ll",
        ),
        ({"rope_parameters": {"rope_type": "odd", "rope_theta": 1e4}}, "rope type 'odd' is not supported"),
    ],
)
def test_configs_that_are_refused(tiny, tmp_path, change, message):
    config = json.loads((tiny["llama2"].folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        hf.read_config(tmp_path)


def test_missing_or_broken_config(tmp_path):
    with pytest.raises(ValueError, match=r"config.json is missing: expected the folder of a Hugging Face checkpoint"):
        hf.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        hf.read_config(tmp_path)


def edit(**changes):
    """A damage that rewrites a single-file checkpoint's tensors; None removes one."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        for name, value in changes.items():
            name = name.replace("__", ".")
            tensors[name] = value
            if value is None:
                del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return damage


def truncate(folder):
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])


def scramble(folder):
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(b"\xff" * 4096)


def remove_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def break_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weights": {}}')


def misname(folder):
    """An index that sends a reader to a shard without the tensor."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    path.write_text(json.dumps(index))


DAMAGES = [
    ("llama2", truncate, ValueError, r"model\.safetensors is damaged or incomplete \(\d+ bytes\)"),
    ("llama2", scramble, ValueError, r"model\.safetensors is damaged or incomplete"),
    ("llama3", truncate, ValueError, r"model-00001-of-\d+\.safetensors is damaged or incomplete"),
    ("llama3", remove_shard, FileNotFoundError, r"model-00002-of-\d+\.safetensors is missing"),
    ("llama3", break_index, ValueError, r"index\.json is not an index of safetensors shards: it has no weight_map"),
    ("llama3", misname, ValueError, r"model-\d+-of-\d+\.safetensors: cannot read tensor model\.norm\.weight"),
    (
        "llama2",
        edit(lm_head__weight=None),
        ValueError,
        r"lm_head\.weight is missing; expected .* \[131, 96\]",
    ),
    (
        "llama2",
        edit(model__norm__weight=torch.ones(95)),
        ValueError,
        r"model\.safetensors: tensor model\.norm\.weight has shape \[95\], expected \[96\]",
    ),
    (
        "llama2",
        edit(model__norm__weight=torch.ones(96, dtype=torch.int8)),
        ValueError,
        r"model\.norm\.weight is of type I8, expected one of F16, BF16, F32, F64",
    ),
    (
        "llama2",
        edit(model__layers__0__self_attn__q_proj__bias=torch.ones(96)),
        ValueError,
        r"1 tensors have no place in this model, the first is model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    ("llama2", lambda folder: (folder / "model.safetensors").unlink(), FileNotFoundError, "holds neither model.safet"),
]


@pytest.mark.parametrize("name, damage, error, message", DAMAGES)
def test_damaged_checkpoints(tiny, tmp_path, name, damage, error, message):
    folder = shutil.copytree(tiny[name].folder, tmp_path / "checkpoint")
    damage(folder)
    with pytest.raises(error, match=message):
        fill(folder, 0, 1)


def load_in_bf16(rank, world_size, folder):
    from megatron_comp.inference.model import build_model, init_parallel

    init_parallel(world_size)
    model = build_model(folder, dtype=torch.bfloat16)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_weights_are_cast_and_old_rotary_buffers_ignored(tmp_path):
    folder = tiny_llama(tmp_path / "model", tie_word_embeddings=True)
    edit(
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8),
        model__norm__weight=torch.linspace(0, 1, 96, dtype=torch.float64),
    )(folder)
    (parameters,) = run_ranks(load_in_bf16, 1, folder)
    assert {p.dtype for p in parameters.values()} == {torch.bfloat16}
    assert torch.equal(parameters["decoder.final_layernorm.weight"], torch.linspace(0, 1, 96).bfloat16())
