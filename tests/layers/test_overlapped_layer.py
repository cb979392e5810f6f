# SPDX-License-Identifier: Apache-2.0
"""Layers whose MLP overlaps with sums in parts: the order of things, equal results, and when they do not."""

import pytest
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from models import LAYERS, biased_model, inside_view, policy
from order import Order
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference.generate import generate, logits
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.wire import exchange

IDS = torch.randint(128, (3, 60), generator=torch.Generator().manual_seed(1))
DROP = {"layers": {1: {"attention": "drop"}}}
SETTINGS = {
    "gather_sum": {"codec": "int8:32:fp16", "algorithm": "gather_sum"},
    "two_step": {"codec": "int8:32:fp16", "algorithm": "two_step"},
    "pair": {"codec": "int8:32:fp16>mxfp8"},
    "parts of other sizes": {"codec": "int8:32:fp16", "sites": {"attention": "int4:32:fp16"}},
    "attention alone": {"codec": "none", "sites": {"attention": "int8:32:fp16"}},
    "mlp alone": {"codec": "none", "sites": {"mlp": "int8:32:fp16"}},
    "dropped, gather_sum": {"codec": "int8:32:fp16", "algorithm": "gather_sum"} | DROP,
    "dropped, two_step": {"codec": "int8:32:fp16", "algorithm": "two_step"} | DROP,
}
WHOLE, PART = 1 << 30, 2000


def without_check(things):
    """The order without the last all-reduce, which tells all ranks whether logits are finite."""
    assert things.order.endswith("a")
    return things.order[:-1]


def run(model, bytes_of_a_part, **words):
    exchange.OVERLAP_BYTES["cpu"] = bytes_of_a_part
    mc.apply_compression(model, policy(**words))
    with Order() as things:
        made = {"logits": logits(model, IDS, gather=True), "order": without_check(things)}
    return made | {"stats": mc.stats(model), "tokens": generate(model, IDS[0], 4).tokens}


def in_parts_and_whole(rank, world_size, folder):
    """setting -> what a model gives in one piece and in parts."""
    init_parallel(world_size)
    model = build_model(folder)
    logits(model, IDS, gather=True)
    view = inside_view(model)
    made = {name: [run(model, size, **words) for size in (WHOLE, PART)] for name, words in SETTINGS.items()}
    mc.apply_compression(model, policy(codec="int8:32:fp16"), timing=True)
    logits(model, IDS, gather=True)
    made["timed"] = mc.stats(model)
    mc.apply_compression(model, policy(**SETTINGS["dropped, two_step"]))
    made["classes"] = {type(layer) for layer in model.decoder.layers}
    made["forwards"] = {"forward" in vars(layer) for layer in model.decoder.layers}
    mc.remove_compression(model)
    assert inside_view(model) == view
    return made


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, llama):
    return run_ranks(in_parts_and_whole, request.param, llama)


@pytest.mark.parametrize("name", SETTINGS)
def test_parts_give_what_the_whole_gives(ranks, name):
    for made in ranks:
        whole, parts = made[name]
        assert torch.equal(parts["logits"], ranks[0][name][1]["logits"])
        # This machine's BLAS multiplies rows alike, however many; another may round otherwise.
        torch.testing.assert_close(parts["logits"], whole["logits"], rtol=0, atol=2e-2)
        assert parts["tokens"] == whole["tokens"] and parts["stats"] == whole["stats"]
        assert sum(site.compressed.calls for site in parts["stats"].sites) > 0


def parts_in(order):
    """Of a sum: products are one for all logits, and in each layer one and three for each part."""
    return (order.count("m") - 1 - LAYERS) // (3 * LAYERS)


def of_layer(name, parts):
    """What a layer does: queries, keys and values; the projection and its sum; the MLP's two products and their sum."""
    one = "m" + "mx" * parts
    mlp = "mmx" * parts
    if name == "two_step":
        # A second exchange begins as soon as the next part is on its way, or is the next to be waited for.
        one = "m" + "mx" + "mxx" * (parts - 1)
        mlp = "mmx" + "mmxx" * (parts - 3) + "x" + "mmxx" * 2 + "x"
    return one + mlp


@pytest.mark.parametrize("name", ["gather_sum", "two_step"])
def test_each_part_is_on_its_way_while_the_next_is_computed(ranks, name):
    whole, parts = (made["order"] for made in ranks[0][name])
    exchanges = 2 if name == "two_step" else 1
    assert whole == "a" + ("mm" + "x" * exchanges + "mm" + "x" * exchanges) * LAYERS + "mx"
    count = parts_in(parts)
    assert count >= 3 and parts == "a" + of_layer(name, count) * LAYERS + "mx"


def test_a_dropped_sum_is_sent_in_the_parts_of_the_mlps(ranks):
    parts = ranks[0]["dropped, gather_sum"][1]["order"]
    count = parts_in(ranks[0]["gather_sum"][1]["order"])
    stock = of_layer("gather_sum", count)
    assert parts == "a" + stock + "mm" + "mmx" * count + stock * (LAYERS - 2) + "mx"


def test_seconds_are_those_of_all_parts(ranks):
    for made in ranks:
        assert all(site.compressed.calls == 1 and site.compressed.seconds > 0 for site in made["timed"].sites)


def test_layers_keep_their_class(ranks):
    for made in ranks:
        assert made["classes"] == {TransformerLayer} and made["forwards"] == {True}


def in_one_piece(rank, world_size, folder):
    """Name -> order of things in a model that may not compute in parts of the rows of a layer."""
    init_parallel(world_size)
    model = build_model(folder)
    exchange.OVERLAP_BYTES["cpu"] = PART
    mc.apply_compression(model, policy(codec="int8:32:fp16"))

    def order():
        with Order() as things:
            logits(model, IDS, gather=True)
        return without_check(things)

    made = {}
    for name in ("self_attention", "self_attention.linear_proj", "mlp.linear_fc1"):
        seen = []
        watched = model.decoder.layers[1].get_submodule(name)
        with watched.register_forward_hook(lambda _module, _args, output, seen=seen: seen.append(output[0].clone())):
            made[name] = order()
        assert len(seen) == 1 and seen[0].shape[:2] == IDS.shape[::-1] and seen[0].abs().sum() > 0, name
    model.train()
    made["training"] = order()
    made["again"] = (model.eval(), order())[1]
    return made


def test_a_layer_that_is_looked_at_computes_all_rows_at_once(llama):
    """Whoever looks at what its parts give sees whole and finished tensors."""
    made = run_ranks(in_one_piece, 2, llama)[0]
    again = made.pop("again")
    count = parts_in(again)
    layer, parted = "m" + "mx" * count + "m" + "mx" * count, of_layer("gather_sum", count)
    assert again == "a" + parted * LAYERS + "mx"
    assert made.pop("training") == "a" + layer * LAYERS + "mx"
    assert set(made.values()) == {"a" + parted + layer + parted * (LAYERS - 2) + "mx"}


def with_biases(rank, world_size):
    init_parallel(world_size)
    model = mc.apply_compression(biased_model(TransformerLayer), policy())
    return ["forward" in vars(layer) for layer in model.decoder.layers]


def test_layers_with_biases_stay_as_they_are():
    assert set(run_ranks(with_biases, 2)[0]) == {False}


def failed_and_again(rank, world_size, folder):
    """A forward that an error ended between a sum's begin and its end, and the next one."""
    init_parallel(world_size)
    model = build_model(folder)
    exchange.OVERLAP_BYTES["cpu"] = PART
    mc.apply_compression(model, policy(codec="int8:32:fp16"))
    good, before = logits(model, IDS, gather=True), inside_view(model)
    for module in (model.decoder.layers[1].pre_mlp_layernorm, model.decoder.layers[2].mlp.linear_fc1):
        module.forward = lambda *_, **__: 1 / 0
        try:
            logits(model, IDS, gather=True)
        except ZeroDivisionError:
            del module.forward
    return good, logits(model, IDS, gather=True), before == inside_view(model)


def test_after_an_error_the_next_forward_is_whole(llama):
    for good, again, as_before in run_ranks(failed_and_again, 2, llama):
        assert torch.equal(good, again) and as_before
