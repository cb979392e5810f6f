"""What `apply_compression` refuses: on every rank, in words that name the key, and before anything is changed."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from models import LAYERS, all_logits, inside_view, message_of, policy
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference.attention import CausalAttention
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.layers import apply

RANKS = 3
KEPT_EXPERTS = {"experts": "none", "shared_experts": "none"}


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
        attempt(f"sites {site}", {"sites": {site: "mxfp8"}})
        attempt(f"layers {site}", {"layers": {1: {site: "mxfp8"}}})
    attempt("policies", {"codec": "mxfp4" if rank < 2 else "mxfp6", "layers": {3: "none", "0-1": "mxfp8"}})
    attempt("one policy is wrong", {"layers": {4: "none"}} if rank == 1 else {})
    with patch.object(apply, "__version__", "9.9.9" if rank == 0 else apply.__version__):
        attempt("versions", {})
    attempt("no layers", {}, torch.nn.Linear(3, 3))
    attempt("layers", {"layers": {"2-4": "none"}})

    mc.apply_compression(model, policy(sites=KEPT_EXPERTS))  # `none` asks for nothing that the model lacks
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


def test_a_process_without_ranks():
    assert not dist.is_initialized()
    assert "nothing to compress" in message_of(mc.apply_compression, torch.nn.Linear(2, 2), policy())
