# SPDX-License-Identifier: Apache-2.0
"""Blocks without attention's sum, by policy: what they compute on which ranks, beside which codecs."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.transformer_layer import TransformerLayer
from models import HIDDEN, IDS, LAYERS, all_logits, inside_view, policy
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference.generate import _feed, generate
from megatron_comp.inference.model import build_model, init_parallel

RANKS = 3
ALL = {f"0-{LAYERS - 1}": {"attention": "drop"}}
POLICIES = {
    "some": {"codec": "none", "layers": {"1-2": {"attention": "drop"}}},
    "all": {"codec": "none", "layers": ALL},
    "all in int8": {"codec": "int8:32:fp16", "algorithm": "gather_sum", "layers": ALL},
    "one of two codecs": {
        "codec": "mxfp8",
        "phases": {"decode": "mxfp4"},
        "layers": {1: {"attention": "drop"}, 2: {"attention": "drop", "mlp": "none"}},
    },
}
NEW = 5


def dropping(words):
    """Layers whose sum a policy drops."""
    return [n for n in range(LAYERS) if mc.CompressionPolicy(**words).drops(n)]


def inside(model):
    """Of a prefill and of a decoded token: every block's input; and this rank's values in the cache, by layer."""
    inputs, context = [], StaticInferenceContext(1, 16)
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: inputs.append(kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in model.decoder.layers
    ]
    with torch.no_grad():
        for ids in (IDS[:1, :9], IDS[:1, 9:10]):
            _feed(model, context, ids, -1)
            context.increment_sequence_len_offset(ids.shape[1])
            context.enable_decode_mode()
    for hook in hooks:
        hook.remove()
    return inputs, [values[:10] for _, values in context.key_value_memory_dict.values()]


def in_ranks(rank, world_size, folder):
    """name -> logits, tokens, caches, stats; and the views of the model before, in and after."""
    init_parallel(world_size)
    model = build_model(folder)
    made = {"stock": all_logits(model)}
    views, keys = [inside_view(model)], list(model.state_dict())
    for name, words in POLICIES.items():
        mc.apply_compression(model, policy(**words))
        assert list(model.state_dict()) == keys
        made[name] = {"logits": all_logits(model), "stats": mc.stats(model)}
        made[name]["tokens"] = generate(model, IDS[0], NEW).tokens
        made[name]["inputs"], made[name]["values"] = inside(model)
    mc.apply_compression(model, policy(codec="none"))
    made["none"], made["none classes"] = all_logits(model), {type(layer) for layer in model.decoder.layers}
    mc.apply_compression(model, policy(**POLICIES["all"]))
    for _ in range(2):
        mc.remove_compression(model)
        views.append(inside_view(model))
    made["removed"] = all_logits(model)
    assert all(view == views[0] for view in views), views
    return made


@pytest.fixture(scope="module")
def ranks(llama):
    return run_ranks(in_ranks, RANKS, llama)


def test_nothing_dropped_is_bit_equal_to_stock(ranks):
    for made in ranks:
        assert torch.equal(made["none"], made["stock"]) and torch.equal(made["removed"], made["stock"])
        assert made["none classes"] == {TransformerLayer}


@pytest.mark.parametrize("name", POLICIES)
def test_every_rank_leaves_with_the_same_bits(ranks, name):
    for made in ranks:
        assert torch.equal(made[name]["logits"], ranks[0][name]["logits"])
        assert not torch.equal(made[name]["logits"], made["stock"])
        assert made[name]["tokens"] == ranks[0][name]["tokens"]


def spd_model(folder, dropped, world_size):
    """Hugging Face's model, in which each rank's heads and neurons are slices of its weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def forward(layer, x, position_embeddings, past_key_values, **_):
        attention, mlp = layer.self_attn, layer.mlp
        heads = []
        hook = attention.o_proj.register_forward_pre_hook(lambda _, args: heads.append(args[0]))
        attention(layer.input_layernorm(x), position_embeddings, None, past_key_values)
        hook.remove()
        total = torch.zeros_like(x)
        for rank in range(world_size):
            mine = [slice(n * rank // world_size, n * (rank + 1) // world_size) for n in (96, 144)]
            y = heads[0][..., mine[0]] @ attention.o_proj.weight[:, mine[0]].t()
            normed = layer.post_attention_layernorm(x + y)
            inner = F.silu(normed @ mlp.gate_proj.weight[mine[1]].t()) * (normed @ mlp.up_proj.weight[mine[1]].t())
            total += y + inner @ mlp.down_proj.weight[:, mine[1]].t()
        return x + total

    for number in dropped:
        layer = model.model.layers[number]
        layer.forward = lambda x, layer=layer, **kwargs: forward(layer, x, **kwargs)
    return model


@torch.no_grad()
def spd_logits(folder, ids, dropped, world_size):
    return spd_model(folder, dropped, world_size)(ids, use_cache=False).logits


@pytest.mark.parametrize("name", ["some", "all"])
def test_logits_are_those_of_the_method(llama, ranks, name):
    expected = spd_logits(llama, IDS, dropping(POLICIES[name]), RANKS)
    # fp32 sums in another order; what the method changes is a hundred times as much
    torch.testing.assert_close(ranks[0][name]["logits"], expected, atol=2e-4, rtol=1e-4)
    assert (ranks[0]["stock"] - expected).abs().max() > 0.02


def test_decoding_continues_as_a_whole_forward_would(llama, ranks):
    for name in ("some", "all"):
        ids = IDS[:1]
        for token in ranks[0][name]["tokens"]:
            logits = spd_logits(llama, ids, dropping(POLICIES[name]), RANKS)[0, -1]
            assert logits[token] >= logits.max() - 1e-3
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_counts(ranks):
    message = IDS.numel() * HIDDEN * 4
    for made in ranks:
        for name, words in POLICIES.items():
            sites = {(site.layer, site.site): site for site in made[name]["stats"].sites}
            assert len(sites) == 2 * LAYERS
            for layer in dropping(words):
                attention = sites[layer, "attention"]
                assert attention.kept_because == {"drop": 1} and attention.kept.calls == 1
                assert attention.kept.received_bytes == attention.kept.message_bytes == 0
                assert attention.compressed.calls == 0
        assert made["some"]["stats"].received_bytes == (2 * LAYERS - 2) * message * 4 // 3
        assert made["all"]["stats"].received_bytes == LAYERS * message * 4 // 3
        assert made["all"]["stats"].bits_per_value == 32
        compressed = {(s.layer, s.site) for s in made["all in int8"]["stats"].sites if s.compressed.calls == 1}
        assert compressed == {(layer, "mlp") for layer in range(LAYERS)}
        kept = {(s.layer, s.site): dict(s.kept_because) for s in made["one of two codecs"]["stats"].sites}
        assert kept[1, "mlp"] == {} and kept[2, "mlp"] == {"policy": 1}


def test_the_joined_sum_is_what_is_compressed(ranks):
    exact, coded, stock = ranks[0]["all"]["logits"], ranks[0]["all in int8"]["logits"], ranks[0]["stock"]
    assert 0 < (coded - exact).abs().mean() < 0.2 * (exact - stock).abs().mean()


@pytest.mark.parametrize("name", POLICIES)
def test_ranks_agree_on_every_blocks_input(ranks, name):
    for made in ranks:
        assert len(made[name]["inputs"]) == 2 * LAYERS
        assert all(map(torch.equal, made[name]["inputs"], ranks[0][name]["inputs"]))


def test_caches_are_those_of_the_method(llama, ranks):
    """Each rank caches its own heads; together they are the cache of the method's blocks on one rank."""
    model = spd_model(llama, dropping(POLICIES["all"]), RANKS)
    with torch.no_grad():
        cache = model(IDS[:1, :10]).past_key_values
    for layer in range(LAYERS):
        ours = torch.cat([made["all"]["values"][layer] for made in ranks], dim=2)
        torch.testing.assert_close(ours, cache.layers[layer].values.permute(2, 0, 1, 3), atol=2e-4, rtol=1e-4)


def one_rank(rank, world_size, folder):
    init_parallel(world_size)
    model = build_model(folder)
    stock = all_logits(model)
    mc.apply_compression(model, policy(layers=ALL))
    return stock, all_logits(model), mc.stats(model), {type(layer) for layer in model.decoder.layers}


def test_one_rank_is_the_stock_block(llama):
    ((stock, made, stats, classes),) = run_ranks(one_rank, 1, llama)
    assert torch.equal(made, stock) and classes == {TransformerLayer}
    assert stats.kept_because == {"one rank": 2 * LAYERS}
