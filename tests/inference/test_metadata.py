# SPDX-License-Identifier: Apache-2.0
"""A model folder is data: nothing in it runs. Each attack here would make a file, by a harmless command."""

import os
import pickle
import sys

import pytest
import torch
import torch.distributed.checkpoint.metadata as described
from checkpoints import tiny_llama
from models import message_of
from ranks import run_ranks
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_comp.inference import checkpoint
from megatron_comp.inference.metadata import read_metadata
from megatron_comp.inference.model import build_model, init_parallel


class Runs:
    """Unpickled, it makes the file `marker`."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


class Reaches:
    """Pickled as a name with dots, which goes from an allowed module to what that module imports."""

    def __init__(self, name, *arguments):
        self.name, self.arguments = name, arguments

    def dump(self):
        module, arguments = "torch.distributed.checkpoint.metadata", pickle.dumps(self.arguments, 4)[2:-1]
        named = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, self.name))
        return b"\x80\x04" + named + b"\x93" + arguments + b"R."


def description(**more):
    chunk = described.ChunkStorageMetadata(torch.Size([0]), torch.Size([4]))
    tensor = described.TensorStorageMetadata(described.TensorProperties(torch.bfloat16), torch.Size([4]), [chunk])
    where = {described.MetadataIndex("weight", torch.Size([0])): _StorageInfo("__0_0.distcp", 0, 8)}
    return described.Metadata({"weight": tensor, **more}, {"kept": [1, 2]}, where)


def test_a_description_is_read_as_torch_reads_it(tmp_path):
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        made = description(
            other=described.TensorStorageMetadata(described.TensorProperties(dtype), torch.Size([2]), [])
        )
        (tmp_path / ".metadata").write_bytes(pickle.dumps(made))
        assert read_metadata(tmp_path) == made == pickle.loads(pickle.dumps(made))


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("where", ["whole", "inside"])
def test_a_description_runs_nothing(tmp_path, where, protocol):
    attack = Runs(tmp_path / "marker")
    content = attack if where == "whole" else description(other=attack)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(content, protocol))
    said = message_of(read_metadata, tmp_path)
    assert str(tmp_path / ".metadata") in said and "which no description of tensors needs" in said
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["os.mkdir", "sys.modules", "dataclass", "field"])
def test_names_reach_nothing_through_allowed_modules(tmp_path, name):
    (tmp_path / ".metadata").write_bytes(Reaches(name, str(tmp_path / "marker")).dump())
    assert f"names torch.distributed.checkpoint.metadata.{name}" in message_of(read_metadata, tmp_path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "content", [b"", b"not a pickle", pickle.dumps({"weight": 1}), pickle.dumps(description())[:-9]]
)
def test_damaged_descriptions_are_named(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    assert "is not the description of a checkpoint" in message_of(read_metadata, tmp_path)
    (tmp_path / ".metadata").unlink()
    assert "cannot be read" in message_of(read_metadata, tmp_path)


def loads(rank, world_size, source, folder):
    """What loading says of `folder`, with a `.metadata` that runs something, and with a weight that is an object."""
    init_parallel(1)
    model = build_model(source)
    checkpoint.save(model, folder)
    path = folder / ".metadata"
    good = path.read_bytes()
    path.write_bytes(pickle.dumps(Runs(folder / "marker")))
    said = [message_of(checkpoint.load, model, folder)]
    metadata = pickle.loads(good)
    metadata.state_dict_metadata["decoder.final_layernorm.weight"] = described.BytesStorageMetadata()
    path.write_bytes(pickle.dumps(metadata))
    file = next(folder.glob("*.distcp"))
    file.write_bytes(
        pickle.dumps(Runs(folder / "marker")) * file.stat().st_size
    )  # what would be unpickled as that object
    said.append(message_of(checkpoint.load, model, folder))
    path.write_bytes(good)
    (folder / "__0.metadata").write_bytes(pickle.dumps(Runs(folder / "marker")))
    said.append(message_of(checkpoint.load, model, folder))
    path.write_bytes(pickle.dumps(Runs(folder / "marker")))
    # Beside safetensors it is not even looked at.
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((source / name).read_bytes())
    same = [torch.equal(*pair) for pair in zip(model.parameters(), build_model(folder).parameters(), strict=True)]
    return said, all(same), (folder / "marker").exists()


def test_loading_a_checkpoint_runs_nothing(tmp_path):
    source = tiny_llama(tmp_path / "source")
    ((attack, no_tensor, of_ranks), same, ran) = run_ranks(loads, 1, source, tmp_path / "saved")[0]
    assert "which no description of tensors needs" in attack
    # From Megatron 0.19 on the damaged file also holds what stands beside the tensors, which is looked at first.
    first = "1 tensors of this model are no tensors in the checkpoint, the first is decoder.final_layern"
    assert first in no_tensor or "saved: cannot be read" in no_tensor
    assert "describes the parts of single ranks" in of_ranks
    assert same and not ran


def test_the_attacks_would_work(tmp_path):
    """Without our reader they do: what is shown above is not that they are harmless."""
    pickle.loads(pickle.dumps(Runs(tmp_path / "one")))
    assert (tmp_path / "one").is_dir()
    assert "os" in vars(sys.modules["torch.distributed.checkpoint.metadata"])
    pickle.loads(Reaches("os.mkdir", str(tmp_path / "two")).dump())
    assert (tmp_path / "two").is_dir()
