"""`apply_compression` on real GPTModels over gloo: what it reaches, what it counts, what it leaves as it was."""

import os
import signal
import time
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference.attention import CausalAttention
from megatron_comp.inference.generate import generate, logits
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.layers import apply
from megatron_comp.wire.codec import Codec

RANKS, LAYERS, HIDDEN = 3, 4, 96
IDS = torch.arange(2, 24).view(2, 11)  # 22 rows: no multiple of the ranks
PLACES = [(layer, site) for layer in range(LAYERS) for site in ("attention", "mlp")]
KEPT_EXPERTS = {"experts": "none", "shared_experts": "none"}

POLICIES = {
    "gather_sum": {"codec": "mxfp4", "algorithm": "gather_sum"},
    "two_step": {"codec": "int4:32:fp16:hadamard", "algorithm": "two_step"},
    "pair": {"codec": "mxfp4>mxfp8"},
}


def policy(**words):
    return mc.CompressionPolicy(**{"codec": "mxfp4", "min_bytes": 0} | words)


def message_of(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "no error"


def all_logits(model):
    return logits(model, IDS, gather=True)


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


def inside_view(model):
    """What removing compression restores."""
    return {
        "classes": [type(module) for module in model.modules()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "communication": [m.explicit_expert_comm for m in model.modules() if isinstance(m, RowParallelLinear)],
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
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
    return made


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
            assert made[f"{name} stats"].kept.calls == 0 and made[f"{name} stats"].compressed.seconds == 0


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


class Wrapper(torch.nn.Module):
    """Hands everything on, as the wrappers around a model do; `rename` as Megatron called the context before."""

    def __init__(self, module, rename=False):
        super().__init__()
        self.module, self.rename = module, rename

    def forward(self, *args, inference_context=None, **kwargs):
        if self.rename:
            return self.module(*args, inference_params=inference_context, **kwargs)
        return self.module(*args, inference_context=inference_context, **kwargs)


PROMPT, NEW = list(range(1, 14)), 5


def prefill_and_decode(model, positional=False):
    """Two forwards of a model that may be wrapped: of a prompt, and of one token."""
    context = StaticInferenceContext(1, 32)
    with torch.no_grad():
        for ids in (torch.tensor([PROMPT]), torch.tensor([[7]])):
            positions = torch.arange(ids.shape[1])[None] + context.sequence_len_offset
            if positional:
                model(ids, positions, None, None, None, context, runtime_gather_output=True)
            else:
                model(ids, positions, None, inference_context=context, runtime_gather_output=True)
            context.increment_sequence_len_offset(ids.shape[1])
            context.enable_decode_mode()


def phases(rank, world_size, folder):
    init_parallel(world_size)
    model, made = build_model(folder), {}
    for name, words in {
        "all": {},
        "prefill": {"phases": {"decode": "none"}},
        "decode": {"phases": {"prefill": "none"}},
        "own_codecs": {"phases": {"prefill": "mxfp8", "decode": "int8:32:fp16"}},
        "min_bytes": {"min_bytes": len(PROMPT) * HIDDEN * 4},
        "min_bytes_more": {"min_bytes": len(PROMPT) * HIDDEN * 4 + 1},
        "auto": {"min_bytes": "auto"},
    }.items():
        mc.apply_compression(model, policy(algorithm="gather_sum", **words), timing=name == "prefill")
        generate(model, PROMPT, NEW)
        made[name] = mc.stats(model)
    decode_stays_stock = policy(phases={"decode": "none"})
    # A forward without a context, after a decode: a prefill again.
    mc.apply_compression(model, decode_stays_stock)
    generate(model, PROMPT, 2)
    all_logits(model)
    made["then_whole"] = mc.stats(model)
    for name, wrapped, positional in (
        ("wrapper", Wrapper(model), False),
        ("old_name", Wrapper(Wrapper(model, rename=True)), False),
        ("positional", model, True),
    ):
        mc.apply_compression(wrapped, decode_stays_stock)
        prefill_and_decode(wrapped, positional)
        made[name] = mc.stats(wrapped)
        mc.remove_compression(wrapped)
    half = build_model(folder, dtype=torch.bfloat16)
    wrapped = Float16Module(half.config, half)
    mc.apply_compression(wrapped, decode_stays_stock)
    prefill_and_decode(wrapped)
    made["float16"] = mc.stats(half)
    # Applied inside and out: removing outside leaves nothing inside.
    mc.apply_compression(half, policy())
    mc.remove_compression(wrapped)
    made["left"] = [len(module._forward_pre_hooks) for module in wrapped.modules() if module._forward_pre_hooks]
    return made


@pytest.fixture(scope="module")
def phased(llama):
    return run_ranks(phases, 2, llama)


ONE = 2 * LAYERS  # calls of a forward
PREFILL, DECODE = ONE, ONE * (NEW - 1)


@pytest.mark.parametrize(
    "name, compressed, kept",
    [
        ("all", PREFILL + DECODE, {}),
        ("prefill", PREFILL, {"policy": DECODE}),
        ("decode", DECODE, {"policy": PREFILL}),
        ("own_codecs", PREFILL + DECODE, {}),
        ("min_bytes", PREFILL, {"min_bytes": DECODE}),
        ("min_bytes_more", 0, {"min_bytes": PREFILL + DECODE}),
        ("auto", 0, {"min_bytes": PREFILL + DECODE}),
        ("then_whole", 2 * ONE, {"policy": ONE}),
        ("wrapper", ONE, {"policy": ONE}),
        ("old_name", ONE, {"policy": ONE}),
        ("positional", ONE, {"policy": ONE}),
        ("float16", ONE, {"policy": ONE}),
    ],
)
def test_phases_and_small_messages(phased, name, compressed, kept):
    for made in phased:
        assert made[name].compressed.calls == compressed
        assert made[name].kept_because == kept
        assert made[name].kept.calls == sum(kept.values())


def test_phases_count_the_values_of_their_own_tokens(phased):
    for made in phased:
        assert made["prefill"].compressed.values == ONE * len(PROMPT) * HIDDEN
        assert made["prefill"].kept.values == DECODE * HIDDEN
        assert made["decode"].compressed.values == DECODE * HIDDEN
        assert made["decode"].kept.values == ONE * len(PROMPT) * HIDDEN
        whole, single = mc.Codec.parse("mxfp8"), mc.Codec.parse("int8:32:fp16")
        assert made["own_codecs"].compressed.message_bytes == (
            PREFILL * whole.message_bytes((len(PROMPT), HIDDEN)) + DECODE * single.message_bytes((1, HIDDEN))
        )


def test_seconds_only_when_asked_for(phased):
    for made in phased:
        assert made["prefill"].compressed.seconds > 0 and made["prefill"].kept.seconds > 0
        assert made["all"].compressed.seconds == 0 and made["decode"].kept.seconds == 0


def test_removing_outside_leaves_no_hook_inside(phased):
    assert all(made["left"] == [] for made in phased)


class TERowParallelLinear(torch.nn.Module):
    """Stands for Transformer Engine's, which needs a GPU."""


class OwnRowParallelLinear(RowParallelLinear):
    """Somebody else's subclass, whose forward nobody here knows."""


class Elsewhere(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.head = model.decoder.layers[0].mlp.linear_fc2
        del model.decoder.layers[0].mlp.linear_fc2


def refused(rank, world_size, folder):
    """name -> what was said, on a model that is as it was afterwards."""
    init_parallel(world_size)
    model, made = build_model(folder), {}

    def attempt(name, words, model=model):
        before = inside_view(model)
        made[name] = message_of(mc.apply_compression, model, policy(**words))
        assert inside_view(model) == before, name

    attempt("layers", {"layers": {"2-4": "none"}})
    for site in KEPT_EXPERTS:
        attempt(f"sites {site}", {"sites": {site: "none"}})
        attempt(f"layers {site}", {"layers": {1: {site: "mxfp8"}}})
    attempt("policies", {"codec": "mxfp4" if rank < 2 else "mxfp6", "layers": {3: "none", "0-1": "mxfp8"}})
    attempt("one policy is wrong", {"layers": {4: "none"}} if rank == 1 else {})
    with patch.object(apply, "__version__", "9.9.9" if rank == 0 else apply.__version__):
        attempt("versions", {})
    attempt("no layers", {}, torch.nn.Linear(3, 3))
    attempt("layers", {"layers": {"2-4": "none"}})

    mc.apply_compression(model, policy())
    attempt("compressed", {"layers": {4: "none"}})
    all_logits(model)
    made["stays compressed"] = mc.stats(model).compressed.calls
    mc.remove_compression(model)

    last = model.decoder.layers[-1].mlp
    last.linear_fc2.skip_bias_add = False
    attempt("bias", {})
    last.linear_fc2.skip_bias_add = True
    last.linear_fc2.__class__ = OwnRowParallelLinear
    attempt("own class", {})
    last.linear_fc2.__class__ = RowParallelLinear
    attempt("elsewhere", {}, Elsewhere(build_model(folder)))
    last.linear_fc2 = TERowParallelLinear()
    attempt("transformer engine", {})
    return made


@pytest.fixture(scope="module")
def refusals(llama):
    return run_ranks(refused, RANKS, llama)


@pytest.mark.parametrize(
    "name, told",
    [
        ("layers", ["layers: '2-4' is out of range", "layers 0 to 3"]),
        ("compressed", ["layers: 4 is out of range"]),
        ("sites experts", ["sites: the model has no experts"]),
        ("sites shared_experts", ["sites: the model has no shared_experts"]),
        ("layers experts", ["layers: 1: the model has no experts"]),
        ("layers shared_experts", ["layers: 1: the model has no shared_experts"]),
        ("policies", ["rank 0: ", '"codec": "mxfp4"', "rank 2: ", '"codec": "mxfp6"']),
        ("one policy is wrong", ["layers: 4 is out of range"]),
        ("versions", ["rank 0: version 9.9.9", f"rank 1: version {mc.__version__}"]),
        ("no layers", ["Linear has no row-parallel linear", "nothing to compress"]),
        ("bias", ["RowParallelLinear(in_features", "skip_bias_add=True"]),
        ("own class", ["OwnRowParallelLinear", "cannot compress"]),
        ("elsewhere", ["head is a row-parallel linear outside"]),
        ("transformer engine", ["Transformer Engine", "local spec"]),
    ],
)
def test_every_rank_says_what_cannot_be_done_and_nothing_changes(refusals, name, told):
    for made in refusals:
        for part in told:
            assert part in made[name]


def test_the_rank_with_the_problem_is_named_to_the_others(refusals):
    said = [made["one policy is wrong"] for made in refusals]
    assert said[0] == said[2] == f"rank 1: {said[1]}"


def test_a_refused_policy_leaves_the_old_one(refusals):
    assert all(made["stays compressed"] == 2 * LAYERS for made in refusals)


def experts_model(layers, shared):
    """A random mixture of experts without Transformer Engine; layers: 1 where a layer has experts."""
    moe_utils.te_general_gemm = None  # Megatron-Core 0.16 names it without importing it
    config = TransformerConfig(
        num_layers=len(layers),
        hidden_size=64,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_moe_experts=4,
        moe_layer_freq=layers,
        moe_router_topk=2,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",
        moe_shared_expert_intermediate_size=32 if shared else None,
        normalization="RMSNorm",
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = CausalAttention
    torch.manual_seed(0)
    return GPTModel(config, spec, vocab_size=32, max_sequence_length=32, position_embedding_type="rope").eval()


@torch.no_grad()
def experts(rank, world_size, shared):
    init_parallel(world_size)
    model = experts_model([1, 1], shared)
    ids = torch.arange(14).view(2, 7)
    positions = torch.arange(7).expand(2, 7)
    stock = model(ids, positions, None)
    made = {
        name: message_of(mc.apply_compression, model, policy(**words))
        for name, words in {
            "codec": {},
            "experts_only": {"sites": {"experts": "none"}},
            "shared_only": {"sites": {"shared_experts": "none"}},
            "decode_only": {"phases": {"prefill": "none"}},
            "a_layer": {"sites": KEPT_EXPERTS, "layers": {1: "mxfp8"}},
            "experts_of_a_layer": {"sites": KEPT_EXPERTS, "layers": {0: {"experts": "mxfp8"}}},
            "no_mlp": {"sites": KEPT_EXPERTS | {"mlp": "mxfp8"}},
            "none": {"codec": "none"},
        }.items()
    }
    none = model(ids, positions, None)
    mc.apply_compression(model, policy(sites=KEPT_EXPERTS, layers={1: {"attention": "mxfp8"}}))
    compressed = model(ids, positions, None)
    stats = mc.stats(model)
    mc.remove_compression(model)
    mixed = experts_model([0, 1], shared)
    for name, words in {
        "mixed, dense layer": {"sites": KEPT_EXPERTS | {"mlp": "mxfp6"}, "layers": {0: "mxfp8"}},
        "mixed, expert layer": {"sites": KEPT_EXPERTS, "layers": {1: "mxfp8"}},
    }.items():
        made[name] = message_of(mc.apply_compression, mixed, policy(**words))
    mixed(ids, positions, None)
    return made, (stock, none, compressed, model(ids, positions, None)), stats, mc.stats(mixed)


@pytest.fixture(scope="module", params=[False, True], ids=["experts", "shared"])
def with_experts(request):
    return run_ranks(experts, 2, request.param)


@pytest.mark.parametrize(
    "name, layer",
    [
        ("codec", 0),
        ("experts_only", 0),
        ("shared_only", 0),
        ("decode_only", 0),
        ("a_layer", 1),
        ("experts_of_a_layer", 0),
        ("mixed, expert layer", 1),
    ],
)
def test_experts_are_refused_unless_the_policy_keeps_them(with_experts, name, layer):
    for made, *_ in with_experts:
        assert f"does not compress experts, as layer {layer} has" in made[name]
        assert "sites: {experts: none, shared_experts: none}" in made[name]


def test_what_a_model_with_experts_can_do(with_experts):
    for made, (stock, none, compressed, removed), stats, mixed in with_experts:
        assert made["no_mlp"] == "policy: sites: the model has no mlp"
        assert made["none"] == made["mixed, dense layer"] == "no error"
        assert torch.equal(none, stock) and torch.equal(removed, stock)
        assert not torch.equal(compressed, stock)
        assert [(site.layer, site.site, site.compressed.calls) for site in stats.sites] == [
            (0, "attention", 1),
            (1, "attention", 1),
        ]
        assert [(site.layer, site.site, site.compressed.calls) for site in mixed.sites] == [
            (0, "attention", 1),
            (0, "mlp", 1),
            (1, "attention", 1),
        ]


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


def test_a_process_without_ranks():
    assert not dist.is_initialized()
    assert "nothing to compress" in message_of(mc.apply_compression, torch.nn.Linear(2, 2), policy())
