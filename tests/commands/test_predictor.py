# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp predictor fit`, and a search whose policy uses its file."""

import json

import pytest
import torch
import yaml
from characters import character_tokenizer
from checkpoints import tiny_mixtral
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from searches import rows_of, search

import megatron_comp as mc
from megatron_comp import cli
from megatron_comp.predict.models import load

LAYERS = 3


def fit(llama, text, folder, *more):
    argv = ["predictor", "fit", "--model", llama, "--tp", 2, "--text", text, "--tokens", 320, "--context", 32]
    return cli.main([str(word) for word in (*argv, "--rank", 16, "--out", folder / "p.safetensors", *more)])


@pytest.fixture(scope="module")
def fitted(llama, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictor")
    assert fit(llama, text, folder, "--most-left", 0.99, "--json", folder / "fit.json") == 0
    return folder


def test_a_file_of_the_sites_that_help(fitted):
    rows = json.loads((fitted / "fit.json").read_text())["rows"]
    assert [row["block"] for row in rows] == list(range(LAYERS))
    with safe_open(fitted / "p.safetensors", "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    written = {(row["block"], site) for row in rows for site in ("attention", "mlp") if row[f"{site}_left"] <= 0.99}
    assert written and {tuple(name.split(".")[1:3]) for name in names} == {(str(n), site) for n, site in written}
    assert metadata["tensor_parallel"] == "2"
    responses = {row["block"] for row in rows if row["response_left"] is not None and row["response_left"] <= 0.99}
    for part in ("response_down", "response_up", "response_bias"):
        assert {name for name in names if name.endswith(part)} == {f"layers.{n}.attention.{part}" for n in responses}


def test_a_mixture_of_experts(text, tmp_path, capsys):
    mixtral = character_tokenizer(tiny_mixtral(tmp_path / "mixtral"))
    assert fit(mixtral, text, tmp_path, "--most-left", 0.999, "--json", tmp_path / "fit.json") == 0
    assert "experts: left" in capsys.readouterr().out
    rows = json.loads((tmp_path / "fit.json").read_text())["rows"]
    with safe_open(tmp_path / "p.safetensors", "pt") as file:
        names = {name.rpartition(".")[0] for name in file.keys()}  # noqa: SIM118
    assert names == {
        f"layers.{row['block']}.{site}" for row in rows for site in ("attention", "experts") if site in row["written"]
    }
    assert any(name.endswith("experts") for name in names)
    assert drops("group", mixtral, text, tmp_path) == drops("distill", mixtral, text, tmp_path) == 2
    assert capsys.readouterr().err.count("mixture of experts cannot do without attention's sum") == 2


def drops(step, model, text, folder):
    argv = ["drop", step, "--model", model, "--tp", 2, "--text", text, "--tokens", 96, "--context", 24]
    return cli.main([str(word) for word in (*argv, "--blocks", 0, "--out", folder / step)])


def test_it_goes_on_where_it_was_and_refuses_another_recipe(fitted, llama, text, capsys):
    before = (fitted / "p.safetensors").stat().st_mtime_ns
    assert fit(llama, text, fitted, "--most-left", 0.99) == 0
    assert (fitted / "p.safetensors").stat().st_mtime_ns == before
    assert fit(llama, text, fitted, "--most-left", 0.5) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rank", "0"], "--rank 0: at least one is needed"),
        (["--rank", "97"], "--rank 97: the model has 96 values per token"),
        (["--most-left", "1"], "--most-left 1.0: allowed are numbers above 0 and below 1"),
        (["--tokens", "32"], "at least two windows"),
    ],
)
def test_bad_options(llama, text, tmp_path, capsys, arguments, message):
    assert fit(llama, text, tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_search_writes_a_policy_that_predicts(fitted, llama, text, tmp_path):
    codecs = [word for bits in (3, 4, 6) for word in ("--codec", f"int{bits}:32:e5m3")]
    status, said = search(tmp_path, llama, text, *codecs, "--max-kl", "0.05", "--predictor", fitted / "p.safetensors")
    assert status == 0, said
    policy = mc.CompressionPolicy.from_file(tmp_path / "policy.yaml")
    assert yaml.safe_load((tmp_path / "policy.yaml").read_text())["predictor"].startswith("..")
    assert (tmp_path / policy.predictor).samefile(fitted / "p.safetensors")
    (chosen,) = (row for row in rows_of(tmp_path) if row["chosen"])
    assert 0 < float(chosen["kl"]) <= 0.05
    assert float(chosen["predicted_kl"]) == pytest.approx(float(chosen["kl"]), rel=0.3)


def trim(fitted, folder, *more):
    argv = ["predictor", "trim", fitted / "p.safetensors", "--out", folder / "trimmed.safetensors", *more]
    return cli.main([str(word) for word in argv])


def test_trimmed_predictors_are_the_first_columns_of_the_whole_ones(fitted, llama, text, tmp_path, capsys):
    assert trim(fitted, tmp_path, "--work", 50, "--json", tmp_path / "trim.json") == 0
    said = " ".join(capsys.readouterr().out.split())
    rows = json.loads((tmp_path / "trim.json").read_text())["rows"]
    ranks = {f"layers.{row['block']}.{site}": row[f"{site}_rank"] for row in rows for site in ("attention", "mlp")}
    assert len(ranks) == 2 * LAYERS and 0 < sum(ranks.values()) < 16 * len(ranks)
    predicted, column = sum(rank > 0 for rank in ranks.values()), 3 * 96 * 2 / load(str(llama)).multiplications
    assert f"{predicted} of {len(ranks)} sums, {sum(ranks.values())} columns, " in said
    assert f"{sum(ranks.values()) * column:.1%} of the layers'" in said
    assert (sum(ranks.values()) + 32 * predicted) * column <= 0.5 < (sum(ranks.values()) + 32 * predicted + 40) * column
    whole, cut = (load_file(folder / f"{name}.safetensors") for folder, name in ((fitted, "p"), (tmp_path, "trimmed")))
    assert {name.rpartition(".")[0] for name in cut} == {name for name, rank in ranks.items() if rank}
    for name, tensor in cut.items():
        where, _, part = name.rpartition(".")
        k = {"down": (..., slice(ranks[where])), "mean": slice(ranks[where]), "up": (slice(None), slice(ranks[where]))}
        assert torch.equal(tensor, whole[name][k.get(part, ...)])
    lefts = {f"layers.{row['block']}.{site}": row[f"{site}_left"] for row in rows for site in ("attention", "mlp")}
    assert all(0 < left <= 1 for left in lefts.values()) and any(left < 1 for left in lefts.values())
    (policy := tmp_path / "policy.yaml").write_text(
        "codec: int8:32:fp16\nmin_bytes: 0\npredictor: trimmed.safetensors\n"
    )
    argv = f"evaluate --model {llama} --tp 2 --text {text} --tokens 64 --context 32 --policy {policy}"
    assert cli.main(argv.split()) == 0
    (tmp_path / "again").mkdir()
    (tmp_path / "trimmed.safetensors").rename(tmp_path / "p.safetensors")
    assert trim(tmp_path, tmp_path / "again", "--work", 50) == 2
    assert "is not a file that `megatron-comp predictor fit` has written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--work", "0"], "--work 0: allowed are percents above 0, up to 100"),
        (["--work", "0.001"], "--work 0.001: not enough for a single sum's predictor"),
        (["--work", "4", "--out", "{fitted}"], "is the file to trim"),
    ],
)
def test_bad_options_of_trim(fitted, tmp_path, capsys, arguments, message):
    assert trim(fitted, tmp_path, *(word.format(fitted=fitted / "p.safetensors") for word in arguments)) == 2
    assert message in capsys.readouterr().err


def test_files_that_trim_cannot_read(fitted, tmp_path, capsys):
    save_file({"layers.0.mlp.down": torch.zeros(1)}, tmp_path / "p.safetensors", metadata={"tensor_parallel": "2"})
    assert trim(tmp_path, tmp_path, "--work", 4) == 2
    assert "is not a file that `megatron-comp predictor fit` has written" in capsys.readouterr().err
    (tmp_path / "p.safetensors").write_text("text")
    assert trim(tmp_path, tmp_path, "--work", 4) == 2
    assert "is not a valid safetensors file" in capsys.readouterr().err
    with safe_open(fitted / "p.safetensors", "pt") as file:
        metadata = file.metadata()
    metadata["rows"] = json.dumps(dict(list(json.loads(metadata["rows"]).items())[:2]))
    save_file(load_file(fitted / "p.safetensors"), tmp_path / "p.safetensors", metadata=metadata)
    assert trim(tmp_path, tmp_path, "--work", 4) == 2
    assert f"has 2 of {LAYERS} layers" in capsys.readouterr().err
