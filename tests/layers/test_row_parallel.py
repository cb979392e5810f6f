# SPDX-License-Identifier: Apache-2.0
"""`CompressedRowParallelLinear`: single linears against the stock class, and the class in hand-written layer specs."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from models import all_logits, message_of, policy
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference.generate import generate
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.layers.reducer import Reducer
from megatron_comp.layers.row_parallel import attach, detach

RANKS = 3
INPUT, OUTPUT = 144, 96
ALGORITHMS = {
    "gather_sum": ("mxfp4", "gather_sum"),
    "two_step": ("int4:32:fp16", "two_step"),
    "pair": ("mxfp4>mxfp8", "auto"),
}


def linear(cls=mc.CompressedRowParallelLinear, *, sequence_parallel=False, experts=None, **kwargs):
    """A linear with random weights and bias, the same on every rank before it is split."""
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=OUTPUT,
        num_attention_heads=3,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        sequence_parallel=sequence_parallel,
        num_moe_experts=experts,
        use_cpu_initialization=True,
    )
    made = cls(
        INPUT,
        OUTPUT,
        config=config,
        init_method=torch.nn.init.normal_,
        **{"bias": True, "input_is_parallel": True, "skip_bias_add": True} | kwargs,
    )
    with torch.no_grad():
        made.bias.normal_()
    return made


def its_input(rank, rows=7):
    torch.manual_seed(100 + rank)
    return torch.randn(rows, 2, INPUT // RANKS)


def partial_sum(x):
    """What the stock class would reduce: its own forward with its reduce bypassed."""
    stock = linear(RowParallelLinear)
    stock.explicit_expert_comm = True
    return stock(x)[0]


@torch.no_grad()
def forwards(rank, world_size):
    init_parallel(world_size)
    x = its_input(rank)
    made = {"partial": partial_sum(x), "stock": linear(RowParallelLinear)(x)}
    for name, (codec, algorithm) in ALGORITHMS.items():
        compressed = linear(policy=policy(codec=codec, algorithm=algorithm), site="mlp").eval()
        made[name] = *compressed(x), mc.all_reduce(made["partial"], codec, algorithm=algorithm), compressed.bias
    made["without_policy"] = linear()(x)
    made["none"] = linear(policy=policy(codec="none"), site="mlp")(x)
    keys = [list(linear(cls).state_dict()) for cls in (RowParallelLinear, mc.CompressedRowParallelLinear)]

    detached = linear(policy=policy(), site="mlp")
    detach(detached)
    made["detached"] = detached(x)
    made["scattered"] = linear(policy=policy(), site="mlp", input_is_parallel=False).eval()(x.repeat(1, 1, 3))[0]
    made["from_whole"] = mc.all_reduce(partial_sum(x.repeat(1, 1, 3).chunk(3, -1)[rank]), "mxfp4")
    return made, keys


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(forwards, RANKS)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_output_is_the_compressed_sum_of_stock_partials(ranks, name):
    for made, _ in ranks:
        output, bias, expected, own_bias = made[name]
        assert torch.equal(output, expected)
        assert torch.equal(bias, own_bias) and bias.abs().sum() > 0  # apart, and not inside the output
        assert torch.equal(output, ranks[0][0][name][0])
        assert not torch.equal(output, made["stock"][0])


def test_gather_sum_is_every_rank_rounded_alike(ranks):
    """Computed here, without collectives: also a rank's own share goes through the codec."""
    codec = mc.Codec.parse("mxfp4")
    partials = [made["partial"] for made, _ in ranks]
    expected = sum(codec.decode(codec.encode(each), each.shape, each.dtype) for each in partials)
    for made, _ in ranks:
        assert torch.equal(made["gather_sum"][0], expected)


@pytest.mark.parametrize("name", ["without_policy", "none", "detached"])
def test_uncompressed_it_is_the_stock_class(ranks, name):
    for made, keys in ranks:
        for ours, stock in zip(made[name], made["stock"]):
            assert torch.equal(ours, stock)
        assert keys[0] == keys[1]


def test_input_that_is_not_split_yet(ranks):
    for made, _ in ranks:
        assert torch.equal(made["scattered"], made["from_whole"])


@torch.no_grad()
def in_sequence_parallel(rank, world_size):
    init_parallel(world_size)
    x = its_input(rank, rows=2 * world_size)
    whole = mc.all_reduce(partial_sum(x), "mxfp4", algorithm="gather_sum")
    compressed = linear(policy=policy(), site="mlp", sequence_parallel=True).eval()
    none = linear(policy=policy(codec="none"), site="mlp", sequence_parallel=True).eval()
    stock = linear(RowParallelLinear, sequence_parallel=True)
    return compressed(x)[0], whole.chunk(world_size)[rank], none(x)[0], stock(x)[0], compressed.reducer.meter.stats


def test_sequence_parallelism_gives_each_rank_its_slice():
    for slice_, of_whole, none, stock, stats in run_ranks(in_sequence_parallel, RANKS):
        assert torch.equal(slice_, of_whole) and slice_.shape == (2, 2, OUTPUT)
        assert torch.equal(none, stock)
        assert stats.compressed.calls == 1 and stats.kept.calls == 0


def gradients(rank, world_size):
    """(output, gradient of the weight, gradient of the input) of the stock linear and of a compressed one."""
    init_parallel(world_size)

    def step(module):
        x = its_input(rank).requires_grad_()
        output, _ = module(x)
        torch.manual_seed(200)  # upstream of an all-reduce is the same on every rank
        output.backward(torch.randn(output.shape))
        return output.detach(), module.weight.grad, x.grad

    compressed = linear()
    attach(compressed, Reducer(policy(codec="mxfp8"), 0, "mlp", compressed.tp_group, allow_training=True))
    refusing = linear(policy=policy(codec="mxfp8"), site="mlp").train()
    try:
        step(refusing)
        refusal = ""
    except RuntimeError as error:
        refusal = str(error)
    with torch.no_grad():
        refusing(its_input(rank))
    return step(linear(RowParallelLinear)), step(compressed), refusal


def test_gradients_are_those_of_the_stock_class():
    for stock, ours, refusal in run_ranks(gradients, RANKS):
        assert not torch.equal(stock[0], ours[0])
        assert torch.equal(stock[1], ours[1]) and torch.equal(stock[2], ours[2])
        assert "mlp: a compressed reduction in training mode" in refusal


def refusals(rank, world_size):
    init_parallel(world_size)
    compressed = partial(linear, policy=policy())
    return {
        "no_site": message_of(compressed),
        "unknown_buffer": message_of(compressed, tp_comm_buffer_name="qkv"),
        "proj": message_of(compressed, tp_comm_buffer_name="proj"),
        "fc2": message_of(compressed, tp_comm_buffer_name="fc2"),
        "layers": message_of(linear, policy=policy(layers={0: "none"}), site="mlp"),
        "phases": message_of(linear, policy=policy(phases={"decode": "none"}), site="mlp"),
        "bias": message_of(compressed, site="mlp", skip_bias_add=False),
        "bias_without_policy": message_of(linear, skip_bias_add=False),
        "expert": message_of(compressed, site="mlp", is_expert=True),
        "experts": message_of(compressed, site="mlp", experts=4),
        "sites": [
            compressed(tp_comm_buffer_name="proj").reducer.site,
            compressed(tp_comm_buffer_name="fc2").reducer.site,
            compressed(tp_comm_buffer_name="fc2", site="shared_experts").reducer.site,
        ],
    }


def test_what_a_linear_cannot_do_is_refused_when_it_is_made():
    (made,) = run_ranks(refusals, 1)
    for name in ("no_site", "unknown_buffer"):
        assert "cannot tell its place" in made[name] and "site='attention' or 'mlp'" in made[name]
    for name in ("layers", "phases"):
        assert f"policy: {name}: " in made[name] and "apply_compression" in made[name]
    assert "CompressedRowParallelLinear(" in made["bias"] and "skip_bias_add=True" in made["bias"]
    assert "cannot tell shared experts" in made["experts"]
    assert "expert" in made["expert"] and "dispatcher" in made["expert"]
    assert made["proj"] == made["fc2"] == made["bias_without_policy"] == "no error"
    assert made["sites"] == ["attention", "mlp", "shared_experts"]


def pair_in_a_spec(rank, world_size):
    init_parallel(world_size)
    return message_of(linear, policy=policy(codec="mxfp4>mxfp8"), site="mlp", sequence_parallel=True)


def test_a_pair_under_sequence_parallelism_is_refused_when_it_is_made():
    for message in run_ranks(pair_in_a_spec, RANKS):
        assert "'mxfp4>mxfp8': sequence parallelism reduces in one phase" in message


def spec_of(params):
    """Megatron's own seam: what the local layer spec takes for row-parallel linears."""
    module = ModuleSpec(module=mc.CompressedRowParallelLinear, params=params)
    return patch.object(LocalSpecProvider, "row_parallel_linear", lambda self: module)


def in_a_spec(rank, world_size, folder):
    init_parallel(world_size)
    stock = build_model(folder)
    applied = all_logits(mc.apply_compression(build_model(folder), policy()))
    chosen = {"codec": "mxfp8", "sites": {"attention": "none"}}
    with spec_of({"policy": policy(**chosen)}):
        with_policy = build_model(folder)
    with spec_of({}):
        without = build_model(folder)
    made = {
        "classes": {type(m).__name__ for m in without.modules() if isinstance(m, RowParallelLinear)},
        "keys": [list(model.state_dict()) for model in (stock, with_policy, without)],
        "stock": all_logits(stock),
        "applied": applied,
        "without": all_logits(without),
        "stats_without": mc.stats(without),
        "with_policy": all_logits(with_policy),
        "sites": mc.stats(with_policy).sites,
        "as_applied": all_logits(mc.apply_compression(build_model(folder), policy(**chosen))),
    }
    mc.apply_compression(without, policy(phases={"decode": "none"}))
    made["then_applied"] = all_logits(without)
    generate(without, [1, 2, 3, 4, 5], 3)
    made["phases"] = mc.stats(without)
    mc.remove_compression(without)
    made["removed"] = all_logits(without)
    made["classes_removed"] = {type(m).__name__ for m in without.modules() if isinstance(m, RowParallelLinear)}
    return made


@pytest.fixture(scope="module")
def specs(llama):
    return run_ranks(in_a_spec, 2, llama)


def test_a_spec_with_a_policy_compresses(specs):
    for made in specs:
        assert torch.equal(made["with_policy"], made["as_applied"])
        assert not torch.equal(made["with_policy"], made["stock"])
        assert [site.site for site in made["sites"]] == ["attention", "mlp"] * 4
        for site in made["sites"]:
            assert (site.layer, site.compressed.calls, site.kept.calls) == (
                (None, 0, 1) if site.site == "attention" else (None, 1, 0)
            )


def test_a_spec_without_a_policy_is_stock_until_one_is_applied(specs):
    for made in specs:
        assert made["classes"] == {"CompressedRowParallelLinear"}
        assert torch.equal(made["without"], made["stock"])
        assert made["stats_without"].sites == []
        names = ("self_attention.linear_proj", "mlp.linear_fc2")
        assert made["stats_without"].without_policy == [
            f"decoder.layers.{n}.{name}" for n in range(4) for name in names
        ]
        assert str(made["stats_without"]).endswith(
            "; 8 compressed linears have no policy: uncompressed, and not counted"
        )
        assert made["phases"].without_policy == []
        assert torch.equal(made["then_applied"], made["applied"])
        assert not torch.equal(made["applied"], made["stock"])
        # one forward for the logits, one prefill; two decoded tokens
        assert made["phases"].compressed.calls == 2 * 8 and made["phases"].kept_because == {"policy": 2 * 8}


def test_removing_leaves_the_class_of_the_spec(specs):
    for made in specs:
        assert torch.equal(made["removed"], made["stock"])
        assert made["classes_removed"] == {"CompressedRowParallelLinear"}


def test_a_spec_keeps_the_checkpoint(specs):
    for made in specs:
        assert made["keys"][0] == made["keys"][1] == made["keys"][2]


def from_a_partial(rank, world_size):
    """Newer Megatrons call builders directly, so that a partial stands for the class."""
    init_parallel(world_size)
    builder = partial(mc.CompressedRowParallelLinear, policy=policy())
    x = its_input(rank)
    with torch.no_grad():
        output, _ = linear(builder, tp_comm_buffer_name="proj").eval()(x)
        return output, mc.all_reduce(partial_sum(x), "mxfp4")


def test_a_partial_of_the_class():
    for output, expected in run_ranks(from_a_partial, RANKS):
        assert torch.equal(output, expected)
