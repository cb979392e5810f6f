# SPDX-License-Identifier: Apache-2.0
"""Where blocks can be without attention's sum: in a spec, on Transformer Engine's linears; and where they cannot."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.transformer_layer import TransformerLayer
from models import IDS, LAYERS, all_logits, biased_model, experts_model, inside_view, message_of, policy
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.layers import sync_drop, transformer_engine
from megatron_comp.wire.codec import Codec

ALL = {f"0-{LAYERS - 1}": {"attention": "drop"}}


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
    with patch.object(transformer_engine, "stock_classes", lambda: (TEStandIn,)):
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
    assert words.codecs() == [Codec.parse("mxfp4"), Codec.parse("mxfp8")]
    assert words.digest() != mc.CompressionPolicy(codec="mxfp4", phases={"decode": "mxfp8"}).digest()
    asked = {"layer": 4, "site": "attention", "phase": "decode", "shape": (1, 1, 64), "itemsize": 2}
    assert words.decide(**asked, world_size=2).reason == "drop"
    assert words.decide(**asked, world_size=1).reason == "one rank"
