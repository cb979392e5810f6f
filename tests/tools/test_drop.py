"""`megatron-comp drop`: blocks in one process against Megatron's ranks, distillation, head grouping, and its files."""

import csv
import itertools
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from checkpoints import tiny_llama
from ranks import run_ranks
from safetensors.torch import load_file, save_file

import megatron_comp as mc
from megatron_comp import cli
from megatron_comp.inference import hf
from megatron_comp.inference.generate import logits
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.tools.drop import blocks, heads, sensitivity
from megatron_comp.tools.drop.block import split_columns, split_mlp, stream
from megatron_comp.tools.drop.criteria import CRITERIA
from megatron_comp.tools.drop.measure import Measured
from megatron_comp.tools.drop.training import Recipe, distill

RANKS, LAYERS = 2, 2
IDS = torch.randint(0, 128, (4, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def llama(tmp_path_factory, smollm2):
    """Folder: 2 layers, 8 query heads over 4 key-value heads, with a real tokenizer."""
    folder = tiny_llama(
        tmp_path_factory.mktemp("llama"),
        vocab_size=49152,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=12,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2 / name, folder / name)
    return folder


def streamed(folder, layers=(1,)):
    config = hf.read_config(folder)
    with hf.Checkpoint(folder) as checkpoint:
        return list(stream(checkpoint, config, IDS, layers))


def layer_outputs(rank, world_size, folder):
    """Of the last block: its input, its output, and its output without attention's sum, on Megatron's layers."""
    init_parallel(world_size)
    model, made = build_model(folder), []
    model.decoder.layers[1].register_forward_hook(
        lambda _, args, kwargs, out: made.append((kwargs["hidden_states"], out[0])), with_kwargs=True
    )
    for words in ({}, {1: {"attention": "drop"}}):
        logits(mc.apply_compression(model, mc.CompressionPolicy(layers=words)), IDS)
    return made


def test_blocks_compute_what_ranks_do(llama):
    ((block, x, out, rope),) = streamed(llama)
    ((x_ranks, stock), (_, dropped)) = run_ranks(layer_outputs, RANKS, llama)[0]
    expected = [t.transpose(0, 1) for t in (x_ranks, stock, dropped)]
    # The same sums in fp32 in another order.
    torch.testing.assert_close(x, expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out, expected[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(block(x, rope, RANKS), expected[2], atol=1e-4, rtol=1e-4)
    assert (expected[2] - expected[1]).abs().max() > 0.1


def test_gradients_come_from_a_ranks_own_mlp(llama):
    """With the output's other parts cut off, a rank's heads learn from its own part of the MLP and from no other's."""
    ((block, x, _, rope),) = streamed(llama)
    layer = block.modules_of
    heads_of = [slice(0, 48), slice(48, 96)]
    with torch.enable_grad():
        for rank in range(RANKS):
            partial = split_columns(block.heads(x, rope), layer.self_attn.o_proj.weight, RANKS)
            normed = layer.post_attention_layernorm(x + partial)
            (gradient,) = torch.autograd.grad(
                split_mlp(layer.mlp, normed, RANKS)[rank].sum(), layer.self_attn.o_proj.weight
            )
            assert gradient[:, heads_of[rank]].abs().max() > 0 and gradient[:, heads_of[1 - rank]].abs().max() == 0


def trained(folder, recipe):
    ((block, x, out, rope),) = streamed(folder)
    log, summary = distill(block, x, out, rope, recipe)
    return block.named(), log, summary


def test_distillation_learns_and_is_deterministic(llama):
    recipe = Recipe(RANKS, epochs=6, batch=2, learning_rate=3e-3)
    first, log, summary = trained(llama, recipe)
    again, *_ = trained(llama, recipe)
    other, *_ = trained(llama, replace(recipe, seed=2))
    assert first.keys() == {name for name in load_file(llama / "model.safetensors") if ".layers.1." in name}
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert [line["epoch"] for line in log] == list(range(6)) and log[-1]["loss"] < log[0]["loss"]
    assert summary["mse_after"] < 0.5 * summary["mse_before"]
    assert summary["relative_after"] < summary["relative_before"]


def main_of_rank(rank, world_size, argv):
    """Several ranks run the command as one that a launcher has started."""
    return cli.main(argv)


def command(ranks, *argv):
    argv = ["drop", *map(str, argv)]
    if ranks == 1:
        return cli.main(argv)
    assert run_ranks(main_of_rank, ranks, argv, init=False) == [0] * ranks
    return 0


@pytest.fixture(scope="module")
def text(sotu_text):
    return ("--text", sotu_text, "--tokens", 96, "--context", 24)


def distilled(llama, text, folder, listed, out, *more):
    options = ("--epochs", 3, "--batch", 2, "--learning-rate", 3e-3, "--out", folder / out)
    return command(1, "distill", "--model", llama, "--tp", RANKS, *text, "--blocks", listed, *options, *more)


@pytest.fixture(scope="module")
def weights(llama, text, tmp_path_factory):
    """Folder with what `distill` writes of both blocks."""
    folder = tmp_path_factory.mktemp("distilled")
    more = ("--json", folder / "d.json", "--log", folder / "log.csv", "--policy-out", folder / "policy.yaml")
    assert distilled(llama, text, folder, "0-1", "both.safetensors", *more) == 0
    return folder


def test_files_of_distillation(llama, weights):
    stock, ours = load_file(llama / "model.safetensors"), load_file(weights / "both.safetensors")
    assert ours.keys() == {name for name in stock if ".layers." in name}
    assert all(ours[name].shape == stock[name].shape for name in ours)
    rows = json.loads((weights / "d.json").read_text())["rows"]
    assert [row["block"] for row in rows] == [0, 1] and all(row["mse_after"] < row["mse_before"] for row in rows)
    with open(weights / "log.csv") as file:
        assert [(line["block"], line["epoch"]) for line in csv.DictReader(file)] == list(itertools.product("01", "012"))
    policy = mc.CompressionPolicy.from_file(weights / "policy.yaml")
    assert [policy.drops(layer) for layer in range(3)] == [True, True, False]


def test_distillation_goes_on_where_it_was(llama, text, weights, tmp_path, capsys):
    assert distilled(llama, text, tmp_path, "0", "w.safetensors") == 0
    assert distilled(llama, text, tmp_path, "0-1", "w.safetensors") == 0
    ours, at_once = load_file(tmp_path / "w.safetensors"), load_file(weights / "both.safetensors")
    assert ours.keys() == at_once.keys() and all(torch.equal(ours[name], at_once[name]) for name in ours)
    assert distilled(llama, text, tmp_path, "0-1", "w.safetensors", "--seed", 5) == 2
    assert "is there already" in capsys.readouterr().err


def with_weights(rank, world_size, folder, file, words):
    """Logits of the stock model; of one with weights of a file; both with a policy."""
    init_parallel(world_size)
    made = []
    for extra in (None, file):
        model = build_model(folder, extra_weights=extra)
        made.append(logits(model, IDS, gather=True))
        made.append(logits(mc.apply_compression(model, mc.CompressionPolicy(layers=words)), IDS, gather=True))
    return made


def test_distilled_weights_load_beside_the_model(llama, weights, tmp_path):
    """As a checkpoint would that holds them in the place of its own."""
    shutil.copytree(llama, tmp_path / "merged")
    tensors = load_file(llama / "model.safetensors") | load_file(weights / "both.safetensors")
    save_file(tensors, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    drop = {"0-1": {"attention": "drop"}}
    ranks = run_ranks(with_weights, RANKS, llama, weights / "both.safetensors", drop)
    merged = run_ranks(with_weights, RANKS, tmp_path / "merged", None, drop)[0]
    for made in ranks:
        assert torch.equal(made[2], merged[0]) and torch.equal(made[3], merged[1])
        assert not torch.equal(made[3], made[1]) and torch.equal(made[0], ranks[0][0])


def refused(rank, world_size, folder, file, text_file):
    init_parallel(world_size)
    said = []
    for extra in (file, text_file, folder / "missing"):
        try:
            build_model(folder, extra_weights=extra)
        except (ValueError, OSError) as error:
            said.append(str(error))
    return said


def test_weights_of_other_ranks_or_no_weights_are_refused(llama, weights, sotu_text):
    ((ranks, no_weights, missing),) = run_ranks(refused, 1, llama, weights / "both.safetensors", sotu_text)
    assert "are for 2 tensor-parallel ranks, not for 1" in ranks
    assert "no safetensors file" in no_weights and "no such file" in missing


def test_grouped_heads_leave_the_stock_model_as_it_was(llama, text, tmp_path):
    """Orders of key-value heads that differ from the model's change it by rounding alone, and a dropped sum by more."""
    file, rows = tmp_path / "g.safetensors", tmp_path / "g.json"
    criteria = ("--criterion", "similar-norm", "--json", rows)
    assert command(1, "group", "--model", llama, "--tp", RANKS, *text, "--blocks", "0-1", "--out", file, *criteria) == 0
    found = json.loads(rows.read_text())["rows"]
    assert {row["criterion"] for row in found} == {"own", *CRITERIA}
    assert all(sorted(row["order"].split()) == list("0123") for row in found)
    written = [row for row in found if row["written"]]
    assert [row["criterion"] for row in written] == ["similar-norm"] * LAYERS
    assert any(row["order"] != "0 1 2 3" for row in written)
    drop = {"0-1": {"attention": "drop"}}
    stock, dropped, grouped, grouped_dropped = run_ranks(with_weights, RANKS, llama, file, drop)[0]
    torch.testing.assert_close(grouped, stock, atol=2e-4, rtol=1e-4)
    assert (grouped_dropped - dropped).abs().max() > 0.01
    start = ("--start", file)
    assert distilled(llama, text, tmp_path, "1", "w.safetensors", *start) == 0
    assert load_file(tmp_path / "w.safetensors").keys() == {
        n for n in load_file(llama / "model.safetensors") if ".1." in n
    }


def test_the_error_that_orders_are_chosen_by_is_the_ranks_own(llama):
    """The error that is told of an order is that of a block whose weights stand so."""
    ((block, x, out, rope),) = streamed(llama)
    for found in heads.candidates(block, x, out, rope, RANKS).values():
        moved = block.replaced(heads.permuted_attention(block, found["order"]))
        assert found["mse"] == pytest.approx((moved(x, rope, RANKS) - out).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("groups, ranks", [(4, 2), (6, 2), (6, 3), (3, 3)])
def test_partitions_are_the_best_there_are(groups, ranks):
    distances = torch.rand(groups, groups, generator=torch.Generator().manual_seed(groups + ranks))
    distances = (distances + distances.t()).fill_diagonal_(0)
    size = groups // ranks

    def value(parts):
        return sum(distances[list(part)][:, list(part)].sum().item() for part in parts)

    orders = itertools.permutations(range(groups))
    every = [[order[i : i + size] for i in range(0, groups, size)] for order in orders]
    for largest, best in ((True, max), (False, min)):
        parts = heads.partition(distances, ranks, largest)
        assert sorted(itertools.chain(*parts)) == list(range(groups)) and {len(part) for part in parts} == {size}
        assert value(parts) == pytest.approx(best(map(value, every)))


def test_distances_are_those_of_the_scores():
    scores = torch.rand(4, 3, 3, generator=torch.Generator().manual_seed(1))
    distances = heads.group_distances(scores, 2)
    expected = sum((scores[a] - scores[b]).norm() for a in (0, 1) for b in (2, 3))
    torch.testing.assert_close(distances, torch.tensor([[0.0, expected], [expected, 0.0]]))


def test_scores_are_causal_means(llama):
    ((block, x, _, rope),) = streamed(llama)
    scores = block.attention_scores(x, rope)
    assert scores.shape == (8, 24, 24) and scores.triu(1).abs().max() == 0
    torch.testing.assert_close(scores.sum(-1), torch.ones(8, 24))


def test_matchings_are_the_best_there_are():
    scores = torch.rand(5, 5, generator=torch.Generator().manual_seed(2)).tolist()
    found = heads.best_matching(scores)
    best = max(itertools.permutations(range(5)), key=lambda parts: sum(scores[p][s] for s, p in enumerate(parts)))
    assert found == list(best)


def test_sensitivity_and_curve(llama, text, weights, tmp_path):
    """The whole way on real ranks; interrupted after the first of its files was half done."""
    files = {name: tmp_path / name for name in ("s.json", "s.state", "s.png", "c.json", "c.state", "c.csv", "c.png")}
    measured = ("--state", files["s.state"], "--figure", files["s.png"], "--json", files["s.json"])
    common = ("--model", llama, "--tp", RANKS, *text)
    command(RANKS, "sensitivity", *common, *measured, "--thresholds", "0", "1e9")
    rows = json.loads(files["s.json"].read_text())["rows"]
    state = json.loads(files["s.state"].read_text())
    points = state["points"]
    assert len(points) == 1 + 2 * LAYERS - 1  # the full model; the last block alone is all from the last on
    full, last, both = (
        points[str(mc.CompressionPolicy(layers=blocks.layers_that_drop(dropped)))]["perplexity"]
        for dropped in ([], [1], [0, 1])
    )
    assert [row["perplexity_delta"] for row in rows] == pytest.approx([both - last, last - full])
    assert all(row["kl"] > 0 and row["class"] == "sensitive" for row in rows)
    assert sorted(row["rank"] for row in rows) == [0, 1] and files["s.png"].stat().st_size > 0

    del points[str(mc.CompressionPolicy(layers={"0": {"attention": "drop"}}))]
    points[str(mc.CompressionPolicy())]["perplexity"] = 7.0  # what is in the file is not measured again
    files["s.state"].write_text(json.dumps(state))
    command(RANKS, "sensitivity", *common, *measured)
    again = json.loads(files["s.json"].read_text())["rows"]
    assert again[0] == rows[0] | {"class": again[0]["class"]} and again[1]["perplexity_delta"] == last - 7.0

    command(
        *(RANKS, "curve", *common, "--sensitivity", files["s.json"], "--in-order"),
        *("--distilled", weights / "both.safetensors", "--percent", "0", "50", "100", "--codec", "none"),
        *("--codec", "int8:32:fp16", "--state", files["c.state"], "--json", files["c.json"]),
        *("--csv", files["c.csv"], "--figure", files["c.png"]),
    )
    found = json.loads(files["c.json"].read_text())["rows"]
    assert len(found) == 3 * 2 * 3 and files["c.png"].stat().st_size > 0
    curve = {(row["order"], row["codec"], row["percent"]): row for row in found}
    base = curve["in order", "none", 0]
    assert base["perplexity"] == pytest.approx(full) and base["kl"] == 0 and base["perplexity_increase_pct"] == 0
    for order in ("in order", "sensitivity"):
        assert curve[order, "none", 100]["perplexity"] == pytest.approx(both)
        assert curve[order, "none", 100]["received_bytes"] == base["received_bytes"] / 2
        coded = curve[order, "int8:32:fp16", 100]["received_bytes"]
        assert coded == pytest.approx(base["received_bytes"] / 2 * 8.5 / 32)
    assert curve["sensitivity", "none", 50]["dropped"] == 1
    healed = curve["sensitivity, distilled", "none", 100]
    assert healed["replaced"] == 2 and healed["kl"] < curve["sensitivity", "none", 100]["kl"]
    assert curve["sensitivity, distilled", "none", 0]["kl"] == 0


def state_of_others(rank, world_size, path):
    init_parallel(world_size)
    Measured(path, {"a": 1}).keep("x", {"kl": 1.0})
    assert Measured(path, {"a": 1}).points == {"x": {"kl": 1.0}}
    said = []
    for settings in ({"a": 2}, {"a": 1}):
        try:
            Measured(path, settings)
        except ValueError as error:
            said.append(str(error))
        if rank == 0:
            os.truncate(path, 5)
        torch.distributed.barrier()
    return said


def test_a_state_of_another_run_is_refused_on_every_rank(tmp_path):
    for other, damaged in run_ranks(state_of_others, 2, str(tmp_path / "state")):
        assert "is of {'a': 1}, not of {'a': 2}" in other and "not a state" in damaged


def test_ranks_and_classes():
    points = [{"block": n, "perplexity": p, "kl": k} for n, (p, k) in enumerate([(16, 0.2), (12, 0.01), (11, 0.03)])]
    rows = sensitivity.rank(points, 10.0, "perplexity_delta", (1.0, 3.0))
    assert [row["perplexity_delta"] for row in rows] == [4, 1, 1]
    assert [row["class"] for row in rows] == ["extreme", "insensitive", "insensitive"]
    assert [row["rank"] for row in rows] == [2, 0, 0]
    assert [row["rank"] for row in sensitivity.rank(points, 10.0, "kl", (0.01, 0.05))] == [2, 0, 1]
    assert [row["class"] for row in sensitivity.rank(points, 10.0, "kl", (0.01, 0.05))] == [
        "extreme",
        "insensitive",
        "sensitive",
    ]


def test_lists_of_blocks():
    assert blocks.parse_blocks("4,0-2,1") == [0, 1, 2, 4]
    assert blocks.layers_that_drop([4, 0, 1, 2]) == {"0-2": {"attention": "drop"}, "4": {"attention": "drop"}}
    assert blocks.share_of([3, 1, 0, 2], 50) == [1, 3] and blocks.share_of([3, 1, 0, 2], 0) == []
    for wrong in ("", "a", "3-1", "1-", "1,,2"):
        with pytest.raises(ValueError, match="expected numbers and ranges"):
            blocks.parse_blocks(wrong)


@pytest.mark.parametrize(
    "words, told",
    [
        (("distill", "--tp", 3, "--blocks", "0", "--out", "w"), "divide 4 key-value heads"),
        (("distill", "--tp", 2, "--blocks", "2", "--out", "w"), "layers 0 to 1, not 2"),
        (("distill", "--tp", 2, "--blocks", "0", "--out", "missing/w"), "--out missing/w: not a file"),
        (("distill", "--tp", 2, "--blocks", "0", "--out", "w", "--epochs", 0), "--epochs 0: at least 1"),
        (("distill", "--tp", 2, "--blocks", "0", "--out", "w", "--start", "no"), "--start no: no such file"),
        (("group", "--tp", 2, "--blocks", "x", "--out", "w"), "expected numbers and ranges"),
        (("sensitivity", "--tp", 1), "--tp 1: one rank sums nothing"),
        (("sensitivity", "--tp", 2, "--thresholds", 2, 1), "the first must not be the larger"),
        (("curve", "--tp", 2, "--percent", 120), "--percent 120.0: allowed are 0 to 100"),
        (("curve", "--tp", 2, "--codec", "drop"), "only attention under layers"),
        (("curve", "--tp", 2, "--distilled", "no"), "--distilled no: no such file"),
    ],
)
def test_mistakes_are_one_line(llama, text, tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["drop", *map(str, words), "--model", str(llama), *map(str, text)]) == 2
    assert told in capsys.readouterr().err
