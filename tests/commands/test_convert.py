# SPDX-License-Identifier: Apache-2.0
"""Hugging Face to Megatron and generating from the result; and whatever keeps it from being made."""

import json
import shutil

import pytest
import torch
from checkpoints import tiny_llama
from models import message_of
from ranks import run_ranks
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_comp import cli
from megatron_comp.commands import convert
from megatron_comp.inference.generate import generate
from megatron_comp.inference.model import build_model, init_parallel


@pytest.fixture(scope="module")
def source(smollm2, tmp_path_factory):
    """A tiny Llama with a real tokenizer, for TP 1, 2 and 3; 49153 tokens are odd, so ranks pad the vocabulary."""
    shape = {"vocab_size": 49153, "hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 8}
    folder = tiny_llama(tmp_path_factory.mktemp("source"), **shape)
    for file in smollm2.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def test_generates_the_same_from_it(command, source, tmp_path):
    out = tmp_path / "megatron"
    done = command("convert", "--model", source, "--out", out, "--tp", 2, "--json", tmp_path / "convert.json")
    assert done.returncode == 0, done.stderr
    assert {"release", "latest_checkpointed_iteration.txt", "config.json", "tokenizer.json"} <= {
        file.name for file in out.iterdir()
    }
    assert [file.name for file in tmp_path.iterdir() if "partial" in file.name] == []

    (row,) = json.loads((tmp_path / "convert.json").read_text())["rows"]
    tensors = FileSystemReader(out / "release").read_metadata().state_dict_metadata
    sizes = {name: entry.size.numel() for name, entry in tensors.items() if hasattr(entry, "size")}
    padding = 2 * 48  # one row of embeddings and one of output weights
    assert row["parameters"] == sum(sizes.values()) - padding
    assert row["bytes"] > 4 * sum(sizes.values())
    assert (row["tp"], row["dtype"]) == (2, "float32")

    assert AutoTokenizer.from_pretrained(out).encode("The") == AutoTokenizer.from_pretrained(source).encode("The")
    for expected, made in run_ranks(generated, 3, source, out):
        assert made == expected


def generated(rank, world_size, *folders):
    init_parallel(world_size)
    return [generate(build_model(folder), [3, 1, 4, 1, 5], 8).tokens for folder in folders]


@pytest.mark.parametrize(
    "out, message",
    [
        ("full", "--out {}: exists and is not an empty folder"),
        ("full/file", "--out {}: exists and is not an empty folder"),
        ("no/where", "--out {}: its folder does not exist"),
    ],
)
def test_refused_before_any_rank_starts(capsys, monkeypatch, source, tmp_path, out, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(cli.ranks, "start", lambda *_: pytest.fail("ranks were started"))
    assert cli.main(["convert", "--model", str(source), "--out", str(tmp_path / out)]) == 2
    assert message.format(tmp_path / out) in capsys.readouterr().err


def convert_a_damaged_one(rank, world_size, source, out):
    init_parallel(world_size)
    return message_of(convert.convert, str(source), out, "auto")


def test_a_failure_leaves_nothing(source, tmp_path):
    """Not even what a run that was killed had left."""
    shutil.copytree(source, tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (tmp_path / ".out.partial" / "release").mkdir(parents=True)
    (tmp_path / ".out.partial" / "release" / "metadata.json").write_text("")
    (message,) = run_ranks(convert_a_damaged_one, 1, tmp_path / "broken", tmp_path / "out")
    assert "model.safetensors is damaged or incomplete" in message
    assert [file.name for file in tmp_path.iterdir()] == ["broken"]


def test_a_full_disk_is_seen_before_the_work(tmp_path):
    with pytest.raises(ValueError, match=r"the weights take 1,000,000,000,000,000,000 bytes, free are [\d,]+"):
        convert.check_space(tmp_path / "out", 10**18)


def test_counts_the_whole_model(source):
    config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config).num_parameters()
    assert convert.parameter_count(config) == expected


# The rule in a checkpoint's config, and the words of Megatron's command line for it.
ROPES = {
    "default": ({"rope_type": "default", "rope_theta": 500.0}, {"use_rope_scaling": False}),
    "linear": (
        {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5},
        {"use_rope_scaling": False, "rotary_seq_len_interpolation_factor": 2.5},
    ),
    "llama3": (
        {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, **convert.MEGATRON_ROPE},
        {"use_rope_scaling": True, "rope_scaling_factor": 32.0},
    ),
}


def frequencies(rank, world_size, cases, out):
    """Of each case: the args in the checkpoint, and the angles of a model built by them as Megatron's scripts build it,
    beside those of the model that was converted."""
    from megatron.core import dist_checkpointing
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    init_parallel(world_size)
    made = {}
    for name, folder in cases.items():
        convert.convert(str(folder), out / name, "auto")
        args = dist_checkpointing.load_common_state_dict(str(out / name / "release"))["args"]
        theirs = RotaryEmbedding(
            args.kv_channels,
            args.rotary_percent,
            rotary_base=args.rotary_base,
            rope_scaling=args.use_rope_scaling,
            rope_scaling_factor=getattr(args, "rope_scaling_factor", 8.0),
            seq_len_interpolation_factor=getattr(args, "rotary_seq_len_interpolation_factor", None),
            use_cpu_initialization=True,
        )
        made[name] = vars(args), theirs(40), build_model(folder).rotary_pos_emb(40)
    return made


def test_args_carry_rope_scaling(tmp_path):
    shape = {"num_hidden_layers": 1, "max_position_embeddings": 16384}
    cases = {name: tiny_llama(tmp_path / name, rope_parameters=rope, **shape) for name, (rope, _) in ROPES.items()}
    (tmp_path / "out").mkdir()
    (made,) = run_ranks(frequencies, 1, cases, tmp_path / "out")
    for name, (args, theirs, ours) in made.items():
        assert args.items() >= ROPES[name][1].items()
        torch.testing.assert_close(theirs, ours)
    assert not torch.equal(made["linear"][2], made["default"][2])


@pytest.mark.parametrize(
    "change", [{"low_freq_factor": 2.0}, {"high_freq_factor": 8.0}, {"original_max_position_embeddings": 64}]
)
def test_rope_scaling_that_megatron_has_no_words_for(command, tmp_path, change):
    """Is told, once; the checkpoint itself is as good as any."""
    rope = {**ROPES["llama3"][0], **change}
    with pytest.raises(ValueError, match=r"no words for the rope type 'llama3' with .*; its own has .*8192"):
        convert.rope_args(rope)
    folder = tiny_llama(tmp_path / "model", num_hidden_layers=1, max_position_embeddings=16384, rope_parameters=rope)
    done = command("convert", "--model", folder, "--out", tmp_path / "out", "--tp", 2)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("megatron-comp: warning: ")]
    assert "Megatron has no words for the rope type 'llama3'" in line and "has other frequencies" in line
