# SPDX-License-Identifier: Apache-2.0
"""`apply_compression` on real GPTModels over gloo: what it reaches, what it sums, what it leaves as it was."""

import os
import signal
import time
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.module import Float16Module
from models import HIDDEN, IDS, LAYERS, all_logits, inside_view, message_of, policy
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.wire.codec import Codec

RANKS = 3
PLACES = [(layer, site) for layer in range(LAYERS) for site in ("attention", "mlp")]

POLICIES = {
    "gather_sum": {"codec": "mxfp4", "algorithm": "gather_sum"},
    "two_step": {"codec": "int4:32:fp16:hadamard", "algorithm": "two_step"},
    "pair": {"codec": "mxfp4>mxfp8"},
}


def outside_view(model):
    """What compression must not touch: checkpoint keys, shards and extra state, weights, hooks' traces on modules."""
    sharded = model.sharded_state_dict(
        metadata={"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    )
    return {
        "keys": {key: None if value is None else tuple(value.shape) for key, value in model.state_dict().items()},
        "sharded": {
            key: (type(value), value.key, getattr(value, "global_shape", None), getattr(value, "global_offset", None))
            for key, value in sharded.items()
        },
        "extra": {name: m.get_extra_state() for name, m in model.named_modules() if isinstance(m, RowParallelLinear)},
        "weights": {name: parameter.data_ptr() for name, parameter in model.named_parameters()},
    }


def there_and_back(rank, world_size, folder, sequence_parallel):
    """name -> logits, and the views of the model before, in and after each policy."""
    init_parallel(world_size)
    model = build_model(folder, sequence_parallel=sequence_parallel)
    assert mc.remove_compression(model) is model  # nothing to undo yet
    made = {"stock": all_logits(model)}
    views, inner = [outside_view(model)], [inside_view(model)]
    policies = {name: words for name, words in POLICIES.items() if not (sequence_parallel and name == "pair")}
    for name, words in policies.items():
        assert mc.apply_compression(model, policy(**words)) is model
        views.append(outside_view(model))
        assert inside_view(model)["classes"] == inner[0]["classes"]  # ModelOpt and Bridge look linears up by class
        made[name] = all_logits(model)
        made[f"{name} stats"] = mc.stats(model)
    mc.apply_compression(model, policy(codec="none"))
    made["none"], made["none stats"] = all_logits(model), mc.stats(model)
    for _ in range(2):
        mc.remove_compression(model)
        views.append(outside_view(model))
        inner.append(inside_view(model))
        made["removed"] = all_logits(model)
        assert mc.stats(model).sites == []
    assert all(view == views[0] for view in views), views
    assert all(view == inner[0] for view in inner), inner
    # Once more, after a detour through no compression, and without one.
    made["again"] = all_logits(mc.apply_compression(model, policy(**POLICIES["gather_sum"])))
    mc.apply_compression(model, policy(**POLICIES["gather_sum"]))
    made["re-applied"], made["re-applied stats"] = all_logits(model), mc.stats(model)
    made["refused pair"] = message_of(mc.apply_compression, model, policy(codec="none", layers={2: "mxfp4>mxfp8"}))
    made["refused pair of a phase"] = message_of(mc.apply_compression, model, policy(phases={"decode": "mxfp4>mxfp8"}))
    made["kept pair"] = message_of(mc.apply_compression, model, policy(codec="none", phases={"decode": "mxfp4>mxfp8"}))
    made["wrapped"] = wrapped(mc.remove_compression(model))
    return made


def wrapped(model):
    """The same of what Megatron's `get_model` returns: a list of chunks, each in wrappers of Megatron's own."""
    config = replace(model.config, bf16=True, params_dtype=torch.bfloat16)
    chunks = [DistributedDataParallel(config, DistributedDataParallelConfig(), Float16Module(config, model))]
    (chunk,) = chunks

    @torch.no_grad()
    def all_logits(chunk):
        ids = IDS[:, :9]  # a multiple of the ranks, for sequence parallelism
        return chunk(ids, torch.arange(9).expand_as(ids), None, runtime_gather_output=True)

    made = {"stock": all_logits(chunk)}
    made["list"] = [refusal(call, chunks) for call in (mc.remove_compression, mc.stats)]
    made["list"].append(refusal(mc.apply_compression, chunks, policy()))
    assert mc.apply_compression(chunk, policy(**POLICIES["gather_sum"])) is chunk
    made["compressed"], made["stats"] = all_logits(chunk), mc.stats(chunk)
    made["inner stats"] = mc.stats(chunk.module.module)
    mc.remove_compression(chunk)
    made["removed"] = all_logits(chunk)
    mc.apply_compression(chunk.module.module, policy(**POLICIES["gather_sum"]))
    made["inner"] = all_logits(chunk)
    return made


def refusal(call, *args):
    with pytest.raises(TypeError) as said:
        call(*args)
    return str(said.value)


@pytest.fixture(scope="module")
def plain(llama):
    return run_ranks(there_and_back, RANKS, llama, False)


@pytest.fixture(scope="module")
def sequence_parallel(llama):
    return run_ranks(there_and_back, RANKS, llama, True)


@pytest.fixture(params=["plain", "sequence_parallel"])
def either(request):
    return request.param, request.getfixturevalue(request.param)


def test_off_is_bit_equal_to_stock(either):
    for made in either[1]:
        for name in ("none", "removed"):
            assert torch.equal(made[name], made["stock"]), name
        assert made["none stats"].kept_because == {"policy": 2 * LAYERS}
        assert made["none stats"].compressed.calls == 0


def test_every_rank_has_the_same_bits(either):
    _, ranks = either
    for name in POLICIES.keys() & ranks[0].keys():
        assert not torch.equal(ranks[0][name], ranks[0]["stock"]), name
        assert (ranks[0][name] - ranks[0]["stock"]).abs().mean() < ranks[0]["stock"].std() / 2
        for made in ranks:
            assert torch.equal(made[name], ranks[0][name]), name
            assert [(site.layer, site.site) for site in made[f"{name} stats"].sites] == PLACES
            assert made[f"{name} stats"].compressed.calls == 2 * LAYERS
            assert made[f"{name} stats"].kept.calls == 0 and made[f"{name} stats"].compressed.seconds is None


def test_wrappers_of_megatron_are_the_model(either):
    for made in (each["wrapped"] for each in either[1]):
        assert made["stats"].compressed.calls == made["inner stats"].compressed.calls == 2 * LAYERS
        assert torch.equal(made["removed"], made["stock"]) and not torch.equal(made["compressed"], made["stock"])
        assert torch.equal(made["inner"], made["compressed"])


def test_a_list_of_chunks_is_refused(either):
    for made in either[1]:
        for said, name in zip(made["wrapped"]["list"], ("remove_compression", "stats", "apply_compression")):
            assert said == f"{name} takes one module, not list; call it for each model chunk"


def test_applying_again_takes_the_new_policy_and_starts_counting_again(either):
    for made in either[1]:
        assert torch.equal(made["again"], made["gather_sum"])
        assert torch.equal(made["re-applied"], made["gather_sum"])
        assert made["re-applied stats"].compressed.calls == 2 * LAYERS


def test_sequence_parallelism_changes_little(plain, sequence_parallel):
    # Rows are rounded one by one, and 11 tokens filled up to 12 change only the order of additions inside matmuls.
    ours, other, stock = plain[0]["gather_sum"], sequence_parallel[0]["gather_sum"], plain[0]["stock"]
    assert (ours - other).abs().mean() < 0.1 * (ours - stock).abs().mean()


def test_sequence_parallelism_refuses_pairs(either):
    name, ranks = either
    for made in ranks:
        for refused in ("refused pair", "refused pair of a phase"):
            if name == "plain":
                assert made[refused] == "no error"
            else:
                assert "'mxfp4>mxfp8'" in made[refused] and "sequence parallelism" in made[refused]
        assert made["kept pair"] == "no error"  # a codec under phases never makes a site compress


def test_bits_per_value_counts_whole_messages(plain, sequence_parallel):
    for ranks, rows in ((plain, 22), (sequence_parallel, 24)):
        stats = ranks[0]["gather_sum stats"]
        message = -(-rows * HIDDEN // 2 // 16) * 16 + -(-rows * HIDDEN // 32 // 16) * 16
        assert stats.compressed.values == 2 * LAYERS * rows * HIDDEN
        assert stats.compressed.message_bytes == 2 * LAYERS * message
        assert stats.bits_per_value == 8 * message / (rows * HIDDEN)
        assert ranks[0]["none stats"].bits_per_value == 32


def one_layer(rank, world_size, folder):
    """(output, stock partial sum, the collective of it) of both linears of a compressed model, by algorithm."""
    init_parallel(world_size)
    model = build_model(folder, dtype=torch.bfloat16)
    made = []
    for words in POLICIES.values():
        for name in ("self_attention.linear_proj", "mlp.linear_fc2"):
            linear = model.decoder.layers[2].get_submodule(name)
            torch.manual_seed(rank)
            x = torch.randn(7, 2, linear.input_size_per_partition, dtype=torch.bfloat16)
            linear.explicit_expert_comm = True
            partial, _ = linear(x)
            linear.explicit_expert_comm = False
            mc.apply_compression(model, policy(**words))
            output, bias = linear(x)
            mc.remove_compression(model)
            collective = mc.all_reduce(partial, words["codec"], None, words.get("algorithm", "auto"))
            made.append((output, bias, partial, collective))
    return made


def test_a_linear_sums_what_the_stock_one_would_have_summed(llama):
    ranks = run_ranks(one_layer, RANKS, llama)
    for linears in zip(*ranks):
        for output, bias, _, collective in linears:
            assert bias is None
            assert torch.equal(output, collective) and torch.equal(output, linears[0][0])
    codec = mc.Codec.parse("mxfp4")
    for linears in list(zip(*ranks))[:2]:  # gather_sum, without any collective
        expected = sum(codec.decode(codec.encode(each[2]), each[2].shape, torch.float32) for each in linears)
        assert torch.equal(linears[0][0], expected.bfloat16())


REACHES = {
    "all": ({}, set(PLACES)),
    "a_site": ({"sites": {"mlp": "none"}}, {p for p in PLACES if p[1] == "attention"}),
    "the_other_site": ({"codec": "none", "sites": {"mlp": "mxfp8"}}, {p for p in PLACES if p[1] == "mlp"}),
    "first_layer": ({"codec": "none", "layers": {0: "mxfp8"}}, {(0, "attention"), (0, "mlp")}),
    "last_layer": ({"layers": {3: "none"}}, {p for p in PLACES if p[0] < 3}),
    "a_range": ({"codec": "none", "layers": {"1-2": "mxfp8"}}, {p for p in PLACES if p[0] in (1, 2)}),
    "a_site_of_a_layer": ({"codec": "none", "layers": {1: {"attention": "mxfp8"}}}, {(1, "attention")}),
    "all_but_one": ({"layers": {"0": {"mlp": "none"}}}, set(PLACES) - {(0, "mlp")}),
    "mixed": (
        {"sites": {"attention": "none"}, "layers": {2: "mxfp8", "3": {"attention": "mxfp8"}}},
        {(0, "mlp"), (1, "mlp"), (2, "attention"), (2, "mlp"), (3, "attention"), (3, "mlp")},
    ),
}


def reached(rank, world_size, folder):
    """name -> places whose output changed when the stock model's input was fed to them, and places that counted."""
    init_parallel(world_size)
    model = build_model(folder)
    names = {"attention": "self_attention.linear_proj", "mlp": "mlp.linear_fc2"}
    made = {}
    for name, (words, _) in REACHES.items():
        changed = set()
        for layer, site in PLACES:
            # Modules are found by their own names here, not by what apply_compression takes them for.
            linear = model.decoder.layers[layer].get_submodule(names[site])
            torch.manual_seed(rank)
            x = torch.randn(3, 1, linear.input_size_per_partition)
            mc.remove_compression(model)
            stock, _ = linear(x)
            mc.apply_compression(model, policy(**words))
            if not torch.equal(linear(x)[0], stock):
                changed.add((layer, site))
        mc.apply_compression(model, policy(**words))
        all_logits(model)
        made[name] = changed, mc.stats(model).sites
    return made


@pytest.fixture(scope="module")
def reaches(llama):
    return run_ranks(reached, 2, llama)


@pytest.mark.parametrize("name", REACHES)
def test_a_policy_reaches_the_linears_it_names(reaches, name):
    for made in reaches:
        changed, sites = made[name]
        assert changed == REACHES[name][1]
        assert {(site.layer, site.site) for site in sites if site.compressed.calls == 1} == REACHES[name][1]
        assert {(site.layer, site.site) for site in sites if site.kept_because == {"policy": 1}} == (
            set(PLACES) - REACHES[name][1]
        )


def one_rank(rank, world_size, folder):
    init_parallel(world_size)
    model = build_model(folder)
    stock = all_logits(model)
    mc.apply_compression(model, policy())
    with patch.object(Codec, "encode", side_effect=AssertionError("encoded with one rank")):
        return stock, all_logits(model), mc.stats(model)


def test_one_rank_encodes_nothing(llama):
    ((stock, made, stats),) = run_ranks(one_rank, 1, llama)
    assert torch.equal(made, stock)
    assert stats.compressed.calls == 0 and stats.kept_because == {"one rank": 2 * LAYERS}
    assert stats.kept.received_bytes == 0


def training(rank, world_size, folder):
    """What a forward with gradients in training mode says, without and with leave to do so."""
    init_parallel(world_size)
    model = build_model(folder).requires_grad_()
    positions = torch.arange(11).expand(2, 11)

    def outcome(train, **options):
        mc.apply_compression(model.train(train), policy(), **options)
        try:
            model(IDS, positions, None).sum().backward()
        except RuntimeError as error:
            return str(error)
        return all(parameter.grad is not None for parameter in model.parameters())

    made = [outcome(True), outcome(False), outcome(True, allow_training=True)]
    with torch.no_grad():
        mc.apply_compression(model.train(), policy())
        model(IDS, positions, None)
    return made, mc.stats(model).compressed.calls


def test_training_needs_leave(llama):
    for (refused, evaluated, allowed), calls in run_ranks(training, 2, llama):
        assert "layer 0 attention: a compressed reduction in training mode" in refused
        assert evaluated is True and allowed is True
        assert calls == 2 * LAYERS


def lose_a_rank(rank, world_size, folder, timeout_seconds, words):
    init_parallel(world_size, timeout_seconds)
    model = build_model(folder)
    mc.apply_compression(model, policy(**words))
    all_logits(model)
    assert mc.stats(model).compressed.calls == 2 * LAYERS
    if rank == 1:
        model.decoder.layers[2].mlp.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    start = time.monotonic()
    try:
        all_logits(model)
    except RuntimeError:
        return time.monotonic() - start
    return None


@pytest.mark.parametrize("name", ["gather_sum", "two_step"])
def test_a_killed_rank_is_an_error_on_the_others_in_time(llama, name):
    timeout = 5
    seconds = run_ranks(lose_a_rank, RANKS, llama, timeout, POLICIES[name], init=False, may_die=(1,))
    assert seconds[1] is None
    for rank in (0, 2):
        assert seconds[rank] is not None, "a number without one rank's share"
        assert seconds[rank] < timeout + 3
