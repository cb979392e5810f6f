# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp drop group`: heads assigned to ranks anew, and the criteria by which they are."""

import itertools
import json

import pytest
import torch
from drops import LAYERS, RANKS, command, distilled, logits_with_weights, streamed
from ranks import run_ranks
from safetensors.torch import load_file

from megatron_comp.spd import heads
from megatron_comp.spd.criteria import CRITERIA


def test_grouped_heads_leave_the_stock_model_as_it_was(two_blocks, drop_text, tmp_path):
    """Orders of key-value heads that differ from the model's change it by rounding alone, and a dropped sum by more."""
    file, rows = tmp_path / "g.safetensors", tmp_path / "g.json"
    criteria = ("--criterion", "similar-norm", "--json", rows)
    assert (
        command(
            1, "group", "--model", two_blocks, "--tp", RANKS, *drop_text, "--blocks", "0-1", "--out", file, *criteria
        )
        == 0
    )
    found = json.loads(rows.read_text())["rows"]
    assert {row["criterion"] for row in found} == {"own", *CRITERIA}
    assert all(sorted(row["order"].split()) == list("0123") for row in found)
    written = [row for row in found if row["written"]]
    assert [row["criterion"] for row in written] == ["similar-norm"] * LAYERS
    assert any(row["order"] != "0 1 2 3" for row in written)
    drop = {"0-1": {"attention": "drop"}}
    stock, dropped, grouped, grouped_dropped = run_ranks(logits_with_weights, RANKS, two_blocks, file, drop)[0]
    torch.testing.assert_close(grouped, stock, atol=2e-4, rtol=1e-4)
    assert (grouped_dropped - dropped).abs().max() > 0.01
    start = ("--start", file)
    assert distilled(two_blocks, drop_text, tmp_path, "1", "w.safetensors", *start) == 0
    assert load_file(tmp_path / "w.safetensors").keys() == {
        n for n in load_file(two_blocks / "model.safetensors") if ".1." in n
    }


def test_the_error_that_orders_are_chosen_by_is_the_ranks_own(two_blocks):
    """The error that is told of an order is that of a block whose weights stand so."""
    ((block, x, out, rope),) = streamed(two_blocks)
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


def test_scores_are_causal_means(two_blocks):
    ((block, x, _, rope),) = streamed(two_blocks)
    scores = block.attention_scores(x, rope)
    assert scores.shape == (8, 24, 24) and scores.triu(1).abs().max() == 0
    torch.testing.assert_close(scores.sum(-1), torch.ones(8, 24))


def test_shards_are_scored_by_what_they_put_out(two_blocks):
    """By "norm": the mean length of it where attention is one part's; by "error": less that of its difference to what
    it is where attention is whole. Both token by token, from the block's weights alone."""
    ((block, x, _, rope),) = streamed(two_blocks)
    layer, ranks = block.modules_of, 2
    mlp, out_proj = layer.mlp, layer.self_attn.o_proj.weight
    size, inner = out_proj.shape[1] // ranks, mlp.gate_proj.weight.shape[0] // ranks

    @torch.no_grad()
    def length(part, shard, error):
        total = 0.0
        neurons = slice(shard * inner, (shard + 1) * inner)

        def shard_of_mlp(attention):
            normed = layer.post_attention_layernorm(window + attention)
            up = mlp.act_fn(normed @ mlp.gate_proj.weight[neurons].t()) * (normed @ mlp.up_proj.weight[neurons].t())
            return up @ mlp.down_proj.weight[:, neurons].t()

        for window in x:
            seen = block.heads(window[None], rope)[0]
            columns = slice(part * size, (part + 1) * size)
            put_out = shard_of_mlp(seen[:, columns] @ out_proj[:, columns].t())
            if error:
                put_out = shard_of_mlp(seen @ out_proj.t()) - put_out
            total += sum(row.norm().item() for row in put_out)
        return total / (len(x) * x.shape[1])

    for match, sign in (("norm", 1), ("error", -1)):
        expected = [[sign * length(part, shard, match == "error") for shard in range(ranks)] for part in range(ranks)]
        assert heads.match_scores(block, x, rope, ranks, match) == [pytest.approx(row, rel=1e-4) for row in expected]


def test_matchings_are_the_best_there_are():
    scores = torch.rand(5, 5, generator=torch.Generator().manual_seed(2)).tolist()
    found = heads.best_matching(scores)
    best = max(itertools.permutations(range(5)), key=lambda parts: sum(scores[p][s] for s, p in enumerate(parts)))
    assert found == list(best)
