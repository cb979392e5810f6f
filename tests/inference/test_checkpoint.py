# SPDX-License-Identifier: Apache-2.0
"""Distributed checkpoints: what a compressed model writes, stock Megatron reads, and the other way round, at any TP."""

import os
import re
import sys
from argparse import Namespace

import commands
import pytest
import torch
from checkpoints import tiny_llama, tiny_mixtral
from megatron.core import dist_checkpointing, parallel_state
from models import message_of, policy
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference import checkpoint, model_files
from megatron_comp.inference.generate import generate
from megatron_comp.inference.model import build_model, destroy_parallel, init_parallel


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """name -> Hugging Face folder. The first and the last fit TP 1, 2 and 3."""
    heads = {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 8}
    return {
        "tied": tiny_llama(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True, **heads),
        "untied": tiny_llama(tmp_path_factory.mktemp("untied"), vocab_size=131),
        "experts": tiny_mixtral(tmp_path_factory.mktemp("experts")),
    }


def described(sharded):
    """What a sharded state dict says to Megatron, without the values."""
    fields = ("key", "dtype", "local_shape", "global_shape", "global_offset", "replica_id", "allow_shape_mismatch")
    return {
        name: (type(entry).__name__, *(getattr(entry, field, None) for field in fields))
        for name, entry in sharded.items()
    }


def save_compressed(rank, world_size, source, folder, expert_parallel=1):
    init_parallel(world_size // expert_parallel, expert_parallel=expert_parallel)
    model = build_model(source)
    stock = described(model.sharded_state_dict()), model.state_dict().keys()
    mc.apply_compression(model, policy())
    assert (described(model.sharded_state_dict()), model.state_dict().keys()) == stock
    assert any("_extra_state" in name for name in stock[1])
    checkpoint.save(model, folder, iteration=3)
    return sorted(entry[1] for entry in stock[0].values() if "_extra_state" not in entry[1])


def load_every_way(rank, world_size, source, folder, expert_parallel=1):
    """Names of parameters that differ from those read from Hugging Face's checkpoint, by who loaded them."""
    init_parallel(world_size // expert_parallel, expert_parallel=expert_parallel)
    expected = build_model(source)
    model, differing = build_model(source), {}

    def compare(who):
        pairs = zip(expected.named_parameters(), model.parameters(), strict=True)
        differing[who] = [name for (name, left), right in pairs if not torch.equal(left, right)]
        for parameter in model.parameters():
            parameter.fill_(torch.nan)

    compare("nobody")
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(folder)), strict=False)
    compare("stock")
    checkpoint.load(model, folder)
    compare("before compression")
    mc.apply_compression(model, policy())
    checkpoint.load(model, folder)
    compare("after compression")
    return differing


@pytest.mark.parametrize("shape, saved, loaded", [("tied", 2, (1, 3)), ("tied", 3, (2,)), ("untied", 1, (2,))])
def test_any_size_reads_what_a_compressed_model_wrote(sources, tmp_path, shape, saved, loaded):
    """Equal bits. The vocabulary is padded to 129 for 3 ranks and, of the second shape, to 132 for 2."""
    names, *_ = run_ranks(save_compressed, saved, sources[shape], tmp_path / "saved")
    assert "decoder.layers.mlp.linear_fc1.layer_norm_weight" in names  # as Transformer Engine's layers have it
    for tp in loaded:
        for rank in run_ranks(load_every_way, tp, sources[shape], tmp_path / "saved"):
            assert rank == dict.fromkeys(rank, []) and len(rank) == 4


@pytest.mark.parametrize("saved, loaded", [((2, 1), (4, 2)), ((4, 2), (3, 1))], ids=["TP2-EP2", "EP2-TP3"])
def test_experts(sources, tmp_path, saved, loaded):
    source = sources["experts"]
    names, *_ = run_ranks(save_compressed, saved[0], source, tmp_path / "saved", saved[1])
    assert "decoder.layers.pre_mlp_layernorm.weight" in names
    for rank in run_ranks(load_every_way, loaded[0], source, tmp_path / "saved", loaded[1]):
        assert rank == dict.fromkeys(rank, [])


def stock_save(tp, source, folder):
    """As Megatron's training saves: its own writers, the model's part under a key, and what training keeps beside."""
    init_parallel(tp)
    model, content = build_model(source), {"non_homogeneous_layers": True}
    state = {
        "model": model.sharded_state_dict(metadata=dict(content)),
        "args": Namespace(tensor_model_parallel_size=tp),
        "iteration": 20,
        "optimizer": {
            "exp_avg": dist_checkpointing.ShardedTensor.from_rank_offsets(
                "optimizer.state.exp_avg.embedding.word_embeddings.weight",
                torch.zeros(4),
                replica_id=parallel_state.get_tensor_model_parallel_rank(),
            )
        },
    }
    iteration = os.path.join(folder, "iter_0000020")
    os.makedirs(iteration, exist_ok=True)
    dist_checkpointing.save(state, iteration, content_metadata=content)
    destroy_parallel()


def load_trained(rank, world_size, source, folder):
    """A folder with Hugging Face's config beside training's, in another dtype; compressed; and what it generates."""
    init_parallel(world_size)
    expected, model = build_model(source, dtype=torch.bfloat16), build_model(folder, dtype=torch.bfloat16)
    pairs = zip(expected.named_parameters(), model.parameters(), strict=True)
    assert [name for (name, left), right in pairs if not torch.equal(left, right)] == []
    model = build_model(folder)
    mc.apply_compression(model, policy(codec="int8:32:fp16"))
    made = generate(model, [1, 2, 3], 4).tokens
    assert mc.stats(model).compressed.calls
    mc.remove_compression(model)
    return made, generate(model, [1, 2, 3], 8).tokens, generate(build_model(source), [1, 2, 3], 8).tokens


def test_what_training_wrote(sources, tmp_path):
    """By a command of its own: Megatron's writers are processes, and ranks of `run_ranks` may not have any."""
    source = sources["tied"]
    # Code and no file, which those processes would import again, and Megatron with it.
    code = "import sys, test_checkpoint; test_checkpoint.stock_save(2, *sys.argv[1:])"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    command = commands.on_ranks(2, [sys.executable, "-c", code, source, tmp_path])
    done = commands.run(command, {**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    (tmp_path / model_files.TRACKER).write_text("20")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    for compressed, plain, expected in run_ranks(load_trained, 3, source, tmp_path):
        assert plain == expected and compressed[0] == expected[0]


def load_other_names(rank, world_size, source, folder):
    init_parallel(1)
    expected, model = build_model(source), build_model(source)
    sharded = model.sharded_state_dict(prefix="module.")
    for entry in sharded.values():
        entry.key = entry.key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    folder.mkdir()
    dist_checkpointing.save(sharded, str(folder), checkpoint._SaveInThisProcess("torch_dist", 1))
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    checkpoint.load(model, folder)
    pairs = zip(expected.parameters(), model.parameters(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def test_other_names(sources, tmp_path):
    """A wrapper's prefix, and the norm before experts as Megatron's own layers (not Transformer Engine's) name it."""
    assert run_ranks(load_other_names, 1, sources["experts"], tmp_path / "saved") == [True]


def bad_loads(rank, world_size, tied, untied, saved):
    init_parallel(1)
    fewer = build_model(tied)
    for layer in fewer.decoder.layers:
        del layer.mlp.linear_fc2
    more = build_model(untied)
    wider = build_model(tied)
    wider.decoder.final_layernorm.weight = torch.nn.Parameter(torch.zeros(97))
    messages = [message_of(checkpoint.load, model, saved) for model in (fewer, more, wider)]
    messages.append(message_of(checkpoint.load, build_model(tied), saved, 5000))
    model, file, common = build_model(tied), next(saved.glob("*.distcp")), saved / "common.pt"
    content = common.read_bytes() if common.exists() else None  # Megatron 0.19 has it among the tensors
    torch.save({"a": 1}, common)
    common.write_bytes(common.read_bytes()[:100])
    messages.append(message_of(checkpoint.load, model, saved))
    common.write_bytes(content) if content else common.unlink()
    file.write_bytes(file.read_bytes()[:1000])
    messages.append(message_of(checkpoint.load, model, saved))
    file.unlink()
    messages.append(message_of(checkpoint.load, model, saved))
    messages.append(message_of(checkpoint.save, fewer, saved))
    return messages


def test_what_does_not_fit_is_named(sources, tmp_path):
    saved = tmp_path / "saved"
    run_ranks(save_compressed, 1, sources["tied"], saved)
    ((fewer, more, wider, other, common, cut, gone, full),) = run_ranks(
        bad_loads, 1, sources["tied"], sources["untied"], saved
    )
    assert "1 tensors have no place in this model, the first is decoder.layers.mlp.linear_fc2.weight" in fewer
    assert "1 tensors of this model are missing in the checkpoint, the first is output_layer.weight" in more
    assert "(torch.Size([96])) and expected ((97,)) tensor for key decoder.final_layernorm.weight" in wider
    assert re.search(r"its vocabulary has \d+ entries, the model's 5000", other)
    assert "__0_0.distcp is damaged or incomplete (1000 bytes, " in cut
    assert gone.endswith("__0_0.distcp is missing") and common.endswith(
        "common.pt is damaged or incomplete (100 bytes)"
    )
    assert full == f"{saved} exists and is not empty"


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, None),
        ({"config.json": ""}, None),
        ({".metadata": "", "metadata.json": ""}, "."),
        ({model_files.TRACKER: "release\n", "release/.metadata": "", "release/metadata.json": ""}, "release"),
        ({model_files.TRACKER: "12", "iter_0000012/.metadata": "", "iter_0000012/metadata.json": ""}, "iter_0000012"),
    ],
)
def test_finds_what_megatron_would(tmp_path, files, expected):
    write(tmp_path, files)
    found = model_files.find_distributed(tmp_path)
    assert found == (None if expected is None else tmp_path / expected)


@pytest.mark.parametrize(
    "files, message",
    [
        ({".metadata": ""}, "metadata.json is missing: expected a complete checkpoint"),
        ({model_files.TRACKER: "7", "iter_0000007/mp_rank_00/model_optim_rng.pt": ""}, "0000007/.metadata is miss"),
        ({model_files.TRACKER: "last"}, "says 'last'; expected an iteration's number or 'release'"),
        ({model_files.TRACKER: "\u00b2"}, "says '\u00b2'; expected an iteration's number"),
        ({model_files.TRACKER: "9" * 5000}, "9'; expected an iteration's number"),
    ],
)
def test_an_incomplete_checkpoint_is_not_taken_for_another(tmp_path, files, message):
    write(tmp_path, files)
    assert message in message_of(model_files.find_distributed, tmp_path)


GOOD = {".metadata": "x", "metadata.json": '{"sharded_backend": "torch_dist"}', "__0_0.distcp": "x"}


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, None),
        ({"__0_0.distcp": ""}, "__0_0.distcp is empty"),
        ({"__0_0.distcp": "version https://git-lfs.github.com/spec/v1"}, "__0_0.distcp is a pointer of git-lfs"),
        ({".metadata": "version https://git-lfs.github.com/spec/v1"}, ".metadata is a pointer of git-lfs"),
        ({"common.pt": ""}, "common.pt is empty"),
        ({"metadata.json": ""}, "metadata.json is not valid JSON"),
        ({"metadata.json": "[]"}, "metadata.json: sharded_backend is None; allowed: 'torch_dist'"),
        ({"metadata.json": '{"sharded_backend": "zarr"}'}, "metadata.json: sharded_backend is 'zarr'; allowed"),
    ],
)
def test_files_that_are_seen_before_ranks_start(tmp_path, files, message):
    write(tmp_path, GOOD | files)
    said = message_of(model_files.check_weights, tmp_path)
    assert said == "no error" if message is None else message in said


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
