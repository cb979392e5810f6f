# SPDX-License-Identifier: Apache-2.0
"""A model folder from elsewhere runs nothing, as a user would try it: each attack here would touch a file."""

import json
import os
import pickle
import shutil

import pytest
import torch
from characters import character_llama
from models import message_of
from ranks import run_ranks

from megatron_comp.inference import checkpoint
from megatron_comp.inference.hf import read_config
from megatron_comp.inference.model import build_model, init_parallel


class Touches:
    """Unpickled, it runs `touch` on a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return character_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


@pytest.fixture
def hostile(llama, tmp_path, marker):
    """A folder of safetensors with what would be taken for a distributed checkpoint beside them, and more pickles."""
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    write_pickles(folder, marker)
    return folder


def write_pickles(folder, marker):
    (folder / "release").mkdir()
    for place in (folder, folder / "release"):
        (place / ".metadata").write_bytes(pickle.dumps(Touches(marker)))
        (place / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
        torch.save(Touches(marker), place / "common.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    torch.save(Touches(marker), folder / "pytorch_model.bin")


def generate(command, folder, **environment):
    return command("generate", "--model", folder, "--tp", 1, "--prompt", "Hi", "--max-new-tokens", 2, **environment)


# Of users who unpickle their own checkpoints this way: it must not open other people's.
TRUSTING = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}


def test_pickles_beside_safetensors(command, hostile, marker):
    done = generate(command, hostile, **TRUSTING)
    assert done.returncode == 0, done.stderr
    assert not marker.exists()


def test_pickles_alone(command, hostile, marker):
    (hostile / "model.safetensors").unlink()
    done = generate(command, hostile, **TRUSTING)
    assert done.returncode == 2 and "names posix.system, which no description of tensors needs" in done.stderr
    assert done.stderr.count("megatron-comp: error") == 1 and not marker.exists()


def save_hostile(rank, world_size, source, folder, marker):
    init_parallel(1)
    checkpoint.save(build_model(source), folder, checkpoint_version=3.0, args=Touches(marker))


def test_what_stands_beside_the_tensors_of_a_whole_checkpoint(command, llama, tmp_path, marker):
    """Megatron reads it for every checkpoint: 0.16 from a file, which the environment may let torch run, and 0.19 from
    among the tensors, where torch runs it in any case."""
    folder = tmp_path / "megatron"
    assert command("convert", "--model", llama, "--out", folder).returncode == 0
    assert generate(command, folder).returncode == 0
    shutil.rmtree(folder / "release")
    run_ranks(save_hostile, 1, llama, folder / "release", marker)
    for environment in ({}, TRUSTING):
        done = generate(command, folder, **environment)
        assert done.returncode == 2 and "release: cannot be read" in done.stderr, done.stderr
        assert not marker.exists()


CODE = "import os; os.system('touch {}')\nclass Config: pass\n"


@pytest.mark.parametrize(
    "file, key, names",
    [
        ("config.json", "auto_map", {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Config"}),
        ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["hostile.Config", "hostile.Config"]}),
    ],
)
def test_code_that_comes_with_a_model(command, llama, tmp_path, marker, monkeypatch, file, key, names):
    """transformers would ask whether to run it, and a script's input would answer."""
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    (folder / "hostile.py").write_text(CODE.format(marker))
    said = json.loads((folder / file).read_text()) | {key: names}
    if file == "tokenizer_config.json":
        said["tokenizer_class"] = "Hostile"
    (folder / file).write_text(json.dumps(said))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    message_of(read_config, folder)
    generate(command, folder)
    assert not marker.exists()


def loads(rank, world_size, folder):
    init_parallel(1)
    return message_of(build_model, folder)


def test_the_loader_by_itself(hostile, marker):
    assert run_ranks(loads, 1, hostile) == ["no error"]
    (hostile / "model.safetensors").unlink()
    (message,) = run_ranks(loads, 1, hostile)
    assert "which no description of tensors needs" in message and not marker.exists()


def test_the_attacks_would_work(hostile, marker):
    """What is shown above is not that they are harmless."""
    for attack in (
        lambda: pickle.loads((hostile / ".metadata").read_bytes()),
        lambda: torch.load(hostile / "common.pt", weights_only=False),
        lambda: torch.load(hostile / "pytorch_model.bin", weights_only=False),
        lambda: exec(CODE.format(marker)),
    ):
        attack()
        assert marker.exists()
        marker.unlink()
