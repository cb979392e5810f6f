"""Blocks without attention's sum: what they compute, on which ranks, beside which codecs, where they are refused."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from models import HIDDEN, IDS, LAYERS, all_logits, experts_model, inside_view, message_of, policy
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference.attention import CausalAttention
from megatron_comp.inference.generate import _feed, generate
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.layers import sync_drop, transformer_engine

RANKS = 3
DROPPED = (1, 2)
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
            _feed(model, context, ids)
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


def biased_model(layer_class, **options):
    """A random GPT with a bias everywhere, its layers of a class that the spec names."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        hidden_dropout=0.0,
        init_method_std=0.2,
        attention_dropout=0.0,
        tensor_model_parallel_size=dist.get_world_size(),
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        **options,
    )
    spec = get_gpt_layer_local_spec()
    spec.module = layer_class
    spec.submodules.self_attention.submodules.core_attention = CausalAttention
    torch.manual_seed(0)
    model = GPTModel(config, spec, vocab_size=32, max_sequence_length=32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


def by_formula(layer, x):
    """The block from its modules' weights and one all-reduce."""
    group, proj, fc2 = layer.tp_group, layer.self_attention.linear_proj, layer.mlp.linear_fc2
    heads = []
    hook = proj.register_forward_pre_hook(lambda _, args: heads.append(args[0]))
    layer.self_attention(layer.input_layernorm(x), None)
    hook.remove()
    y = heads[0] @ proj.weight.t()
    inner, bias = layer.mlp.linear_fc1(layer.pre_mlp_layernorm(x + y + proj.bias))
    total = y + F.gelu(inner + (bias if bias is not None else 0)) @ fc2.weight.t()
    dist.all_reduce(total, group=group)
    return x + proj.bias + total + fc2.bias


@torch.no_grad()
def in_a_spec(rank, world_size):
    """Of a model whose spec names the class: a block's output, the formula's, and whole outputs by what is applied."""
    init_parallel(world_size)
    ids = torch.arange(16).view(2, 8)
    positions = torch.arange(8).expand(2, 8)
    stock, model = biased_model(TransformerLayer), biased_model(sync_drop.SyncDropLayer)
    model.load_state_dict(stock.state_dict())

    def run(each):
        return each(ids, positions, None, runtime_gather_output=True)

    x = torch.randn(8, 2, 32, generator=torch.Generator().manual_seed(1))
    made = {"block": model.decoder.layers[0](x, attention_mask=None)[0], "stock": run(stock), "spec": run(model)}
    made["formula"] = by_formula(stock.decoder.layers[0], x)
    both = policy(codec="none", layers={"0-1": {"attention": "drop"}})
    made["applied"] = run(mc.apply_compression(stock, both))
    made["applied to spec"] = run(mc.apply_compression(model, both))
    made["kept in spec"] = run(mc.apply_compression(model, policy(codec="none")))
    made["removed from spec"] = run(mc.remove_compression(model))
    return made


def test_biases_and_a_spec():
    made, other = run_ranks(in_a_spec, 2)
    torch.testing.assert_close(made["block"], made["formula"], atol=1e-5, rtol=1e-5)
    assert torch.equal(made["block"], other["block"]) and torch.equal(made["spec"], other["spec"])
    assert torch.equal(made["spec"], made["applied"]) and torch.equal(made["spec"], made["applied to spec"])
    assert (made["spec"] - made["stock"]).abs().max() > 1e-3
    assert torch.equal(made["kept in spec"], made["stock"]) and torch.equal(made["removed from spec"], made["stock"])


class TEStandIn(torch.nn.Module):
    """As TERowParallelLinear, with bias and no value in it: sums itself in parallel mode "row" only."""

    def __init__(self, local):
        super().__init__()
        self.weight, self.config, self._tp_group, self.bias = local.weight, local.config, local.tp_group, torch.empty(0)
        self.sequence_parallel, self.parallel_mode, self.use_bias, self.te_return_bias = False, "row", False, False

    def forward(self, x):
        assert self.parallel_mode is None, "the linear's own reduction was asked for"
        return x @ self.weight.t(), None


def on_transformer_engine(rank, world_size, folder):
    """By policy: logits of linears that stand for Transformer Engine's, and of the local ones."""
    init_parallel(world_size)
    local, made = build_model(folder), {}
    with patch.object(transformer_engine, "stock_classes", lambda: {TEStandIn: transformer_engine._CompressedTELinear}):
        model = build_model(folder)
        for layer in model.decoder.layers:
            layer.self_attention.linear_proj = TEStandIn(layer.self_attention.linear_proj)
            layer.mlp.linear_fc2 = TEStandIn(layer.mlp.linear_fc2)
        before = [type(module) for module in model.eval().modules()]
        for codec in ("none", "int8:32:fp16"):
            words = policy(codec=codec, layers=ALL)
            made[codec] = [all_logits(mc.apply_compression(each, words)) for each in (model, local)]
            stats = mc.stats(model)
            assert stats.kept_because["drop"] == LAYERS and stats.compressed.calls == (LAYERS if codec != "none" else 0)
        mc.remove_compression(model)
        assert [type(module) for module in model.modules()] == before
        model.decoder.layers[1].mlp.linear_fc2.config.tp_comm_overlap = True
        made["refused"] = message_of(mc.apply_compression, model, words)
    return made


def test_linears_of_transformer_engine(llama):
    for made in run_ranks(on_transformer_engine, 2, llama):
        for codec in ("none", "int8:32:fp16"):
            assert torch.equal(*made[codec])
        assert "set tp_comm_overlap=False" in made["refused"]


class OwnLayer(TransformerLayer):
    """Somebody else's subclass."""


def refused(rank, world_size, folder):
    init_parallel(world_size)
    words = policy(codec="none", layers={1: {"attention": "drop"}})
    made = {
        "sequence parallelism": message_of(mc.apply_compression, build_model(folder, sequence_parallel=True), words),
        "experts": message_of(mc.apply_compression, experts_model(), words),
        "own class": message_of(mc.apply_compression, biased_model(OwnLayer), words),
        "chunks": message_of(mc.apply_compression, biased_model(TransformerLayer, mlp_chunks_for_prefill=2), words),
        "spec": message_of(biased_model, sync_drop.SyncDropLayer, mlp_chunks_for_prefill=2),
    }
    model = build_model(folder)
    before = inside_view(model)
    none, model.decoder.layers[1].cross_attention = model.decoder.layers[1].cross_attention, torch.nn.Linear(1, 1)
    made["cross-attention"] = message_of(mc.apply_compression, model, words)
    model.decoder.layers[1].cross_attention = none
    assert inside_view(model) == before
    mc.apply_compression(model, words)
    for training, requires_grad in ((True, False), (False, True)):
        try:
            with torch.set_grad_enabled(requires_grad):
                model.train(training).requires_grad_(requires_grad)(IDS, torch.arange(11).expand(2, 11), None)
        except RuntimeError as error:
            made[f"training {training}"] = str(error)
    return made


@pytest.mark.parametrize(
    "name, told",
    [
        ("sequence parallelism", ["layers: 1: attention cannot be dropped", "set sequence_parallel=False"]),
        ("experts", ["layers: 1: attention cannot be dropped", "different experts"]),
        ("own class", ["OwnLayer is no TransformerLayer"]),
        ("chunks", ["mlp_chunks_for_prefill=2", "set mlp_chunks_for_prefill=1"]),
        ("spec", ["layers: 0: attention cannot be dropped", "mlp_chunks_for_prefill=2"]),
        ("cross-attention", ["cross-attention"]),
        ("training True", ["layer 1: a block without attention's sum is for inference"]),
        ("training False", ["torch.no_grad()"]),
    ],
)
def test_refusals(refusals, name, told):
    for made in refusals:
        for part in told:
            assert part in made[name], made[name]


@pytest.fixture(scope="module")
def refusals(llama):
    return run_ranks(refused, 2, llama)


@pytest.mark.parametrize(
    "words, told",
    [
        ({"codec": "drop"}, "codec: only attention under layers drops"),
        ({"sites": {"attention": "drop"}}, "sites: attention: only attention under layers"),
        ({"phases": {"decode": "drop"}}, "phases: decode: only attention under layers"),
        ({"layers": {3: "drop"}}, "layers: 3: only attention under layers"),
        ({"layers": {"3-9": {"mlp": "drop"}}}, "layers: 3-9: mlp: only attention under layers"),
    ],
)
def test_where_a_policy_may_say_drop(words, told):
    with pytest.raises(ValueError, match=told):
        mc.CompressionPolicy(**words)


def test_a_policy_that_drops():
    words = mc.CompressionPolicy(codec="mxfp4", phases={"decode": "mxfp8"}, layers={"3-5": {"attention": "drop"}})
    assert [layer for layer in range(9) if words.drops(layer)] == [3, 4, 5]
    assert words.codec_name(4, "attention", "decode") == "none" and words.codec_name(4, "mlp", "decode") == "mxfp8"
    assert words.named_codecs() == {"mxfp4", "mxfp8"}
    assert words.digest() != mc.CompressionPolicy(codec="mxfp4", phases={"decode": "mxfp8"}).digest()
    asked = {"layer": 4, "site": "attention", "phase": "decode", "shape": (1, 1, 64), "itemsize": 2}
    assert words.decide(**asked, world_size=2).reason == "drop"
    assert words.decide(**asked, world_size=1).reason == "one rank"
