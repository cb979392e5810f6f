# SPDX-License-Identifier: Apache-2.0
"""Files of `megatron-comp drop distill`: what is in them, how they go on, and models that load them."""

import csv
import itertools
import json
import shutil

import pytest
import torch
import yaml
from drops import RANKS, distilled, logits_with_weights
from predictors import tensors, write
from ranks import run_ranks
from safetensors.torch import load_file, save_file

import megatron_comp as mc
from megatron_comp import cli
from megatron_comp.inference.hf import read_config
from megatron_comp.inference.model import build_model, init_parallel


@pytest.fixture(scope="module")
def weights(two_blocks, drop_text, tmp_path_factory):
    """Folder with what `distill` writes of both blocks."""
    folder = tmp_path_factory.mktemp("distilled")
    more = ("--json", folder / "d.json", "--log", folder / "log.csv", "--policy-out", folder / "policy.yaml")
    assert distilled(two_blocks, drop_text, folder, "0-1", "both.safetensors", *more) == 0
    return folder


def test_files_of_distillation(two_blocks, weights):
    stock, ours = load_file(two_blocks / "model.safetensors"), load_file(weights / "both.safetensors")
    assert ours.keys() == {name for name in stock if ".layers." in name}
    assert all(ours[name].shape == stock[name].shape for name in ours)
    rows = json.loads((weights / "d.json").read_text())["rows"]
    assert [row["block"] for row in rows] == [0, 1] and all(row["mse_after"] < row["mse_before"] for row in rows)
    with open(weights / "log.csv") as file:
        assert [(line["block"], line["epoch"]) for line in csv.DictReader(file)] == list(itertools.product("01", "012"))
    policy = mc.CompressionPolicy.from_file(weights / "policy.yaml")
    assert [policy.drops(layer) for layer in range(3)] == [True, True, False]


def test_distillation_goes_on_where_it_was(two_blocks, drop_text, weights, tmp_path, capsys):
    assert distilled(two_blocks, drop_text, tmp_path, "0", "w.safetensors") == 0
    assert distilled(two_blocks, drop_text, tmp_path, "0-1", "w.safetensors") == 0
    ours, at_once = load_file(tmp_path / "w.safetensors"), load_file(weights / "both.safetensors")
    assert ours.keys() == at_once.keys() and all(torch.equal(ours[name], at_once[name]) for name in ours)
    assert distilled(two_blocks, drop_text, tmp_path, "0-1", "w.safetensors", "--seed", 5) == 2
    assert "is there already" in capsys.readouterr().err


def test_distilled_weights_load_beside_the_model(two_blocks, weights, tmp_path):
    """As a checkpoint would that holds them in the place of its own."""
    shutil.copytree(two_blocks, tmp_path / "merged")
    tensors = load_file(two_blocks / "model.safetensors") | load_file(weights / "both.safetensors")
    save_file(tensors, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    drop = {"0-1": {"attention": "drop"}}
    ranks = run_ranks(logits_with_weights, RANKS, two_blocks, weights / "both.safetensors", drop)
    merged = run_ranks(logits_with_weights, RANKS, tmp_path / "merged", None, drop)[0]
    for made in ranks:
        assert torch.equal(made[2], merged[0]) and torch.equal(made[3], merged[1])
        assert not torch.equal(made[3], made[1]) and torch.equal(made[0], ranks[0][0])


def test_distillation_with_a_predictor(two_blocks, drop_text, weights, tmp_path, capsys):
    """Layers that see the other ranks' predicted parts learn with them, and run with no other predictor."""
    (folder := tmp_path / "predictor").mkdir()
    hidden = read_config(two_blocks).hidden_size
    predictor = write(folder / "p.safetensors", tensors(2, hidden, RANKS, scale=0.01, sites=["attention"]), RANKS)
    more = ("--predictor", predictor, "--policy-out", tmp_path / "policy.yaml")
    assert distilled(two_blocks, drop_text, tmp_path, "0-1", "w.safetensors", *more) == 0
    ours, without = load_file(tmp_path / "w.safetensors"), load_file(weights / "both.safetensors")
    assert ours.keys() == without.keys() and not any(torch.equal(ours[name], without[name]) for name in ours)
    words = yaml.safe_load((tmp_path / "policy.yaml").read_text())
    assert words["predictor"] == "predictor/p.safetensors" and words["layers"] == {"0-1": {"attention": "drop"}}
    argv = ["evaluate", "--model", two_blocks, "--tp", RANKS, *drop_text, "--weights", tmp_path / "w.safetensors"]
    assert cli.main([*map(str, argv), "--policy", str(tmp_path / "policy.yaml")]) == 0
    assert cli.main([*map(str, argv), "--policy", str(weights / "policy.yaml")]) == 2
    assert "were distilled with a predictor (digest " in capsys.readouterr().err
    assert distilled(two_blocks, drop_text, tmp_path, "0-1", "w.safetensors") == 2
    assert "is there already" in capsys.readouterr().err
    of_mlps = write(folder / "m.safetensors", tensors(2, hidden, RANKS, sites=["mlp"]), RANKS)
    assert distilled(two_blocks, drop_text, tmp_path, "0-1", "other.safetensors", "--predictor", of_mlps) == 2
    assert "predicts attention's sum in none of layers 0-1" in capsys.readouterr().err


def test_checkpoints_of_megatron_are_refused_before_any_work(two_blocks, drop_text, weights, tmp_path, capsys):
    folder = tmp_path / "megatron"
    shutil.copytree(two_blocks, folder)
    (folder / "model.safetensors").unlink()
    for name in (".metadata", "metadata.json"):
        (folder / name).write_text("{}")
    text, out = [str(word) for word in drop_text], ("--out", str(tmp_path / "out"))
    common, file = ("--model", str(folder), "--tp", "2"), str(weights / "both.safetensors")
    for words in (
        ("drop", "distill", *common, *text, "--blocks", "0", *out),
        ("drop", "group", *common, *text, "--blocks", "0", *out),
        ("drop", "curve", *common, *text, "--weights", file),
        ("generate", *common, "--prompt", "a", "--weights", file),
        ("search", *common, *text, *out, "--max-kl", "1", "--with-drop", "--link", "1gbit", "--weights", file)
        + ("--weights-out", str(tmp_path / "w")),
    ):
        assert cli.main(list(words)) == 2
        said = capsys.readouterr().err
        assert "megatron is a checkpoint of Megatron's, whose layers are not read one by one" in said, said


def refused(rank, world_size, folder, file, text_file):
    init_parallel(world_size)
    said = []
    for extra in (file, text_file, folder / "missing"):
        try:
            build_model(folder, extra_weights=extra)
        except (ValueError, OSError) as error:
            said.append(str(error))
    return said


def test_weights_of_other_ranks_or_no_weights_are_refused(two_blocks, weights, sotu_text):
    ((ranks, no_weights, missing),) = run_ranks(refused, 1, two_blocks, weights / "both.safetensors", sotu_text)
    assert "are for 2 tensor-parallel ranks, not for 1" in ranks
    assert "no safetensors file" in no_weights and "no such file" in missing
