# SPDX-License-Identifier: Apache-2.0
"""What `apply_compression` refuses: on every rank, in words that name the key, and before anything is changed."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.moe import shared_experts
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from models import LAYERS, all_logits, experts_model, inside_view, message_of, policy
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.layers import agreement, apply
from megatron_comp.layers.compressed_layer import compress_layer

RANKS = 3
KEPT_EXPERTS = {"experts": "none", "shared_experts": "none"}


class TEFusedMLP(torch.nn.Module):
    """Stands for Megatron's, which needs Transformer Engine."""


class OwnRowParallelLinear(RowParallelLinear):
    """Somebody else's subclass, whose forward nobody here knows."""

    def forward(self, input_):
        return super().forward(input_)


class OwnSharedExperts(SharedExpertMLP):
    """Somebody else's subclass."""


class FusedSharedExpertMLP(SharedExpertMLP):
    """Stands for Megatron's of that name (0.19), which goes past its linears and needs Transformer Engine."""

    def forward(self, hidden_states):
        return super().forward(hidden_states)


class MoEFlexTokenDispatcher(MoETokenDispatcher):
    """Stands for Megatron's, which needs libraries for GPUs."""


# Files that one rank alone cannot use -> what all ranks must say of them; None is a file that is not there.
ON_ONE_RANK = {
    "missing.yaml": (None, "missing.yaml: No such file or directory"),
    "folder.yaml": ("a folder", "folder.yaml: Is a directory"),
    "not.yaml": ("codec: [mxfp4", "not.yaml is not YAML"),
    "other.yaml": ("codec: mxfp4\nminbytes: 5\n", "other.yaml: policy: key: 'minbytes' is unknown"),
    "lost.yaml": ("predictor: lost.safetensors\n", "lost.safetensors: No such file or directory"),
    "cut.yaml": ("predictor: cut.yaml\n", "cut.yaml is not a valid safetensors file"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "folder.yaml").mkdir()
    for name, (content, _) in ON_ONE_RANK.items():
        if content and name != "folder.yaml":
            (folder / name).write_text(content)
    return folder


def refused(rank, world_size, folder, files):
    """name -> what was said, on a model that is as it was afterwards."""
    init_parallel(world_size)
    model, made = build_model(folder), {}

    def attempt(name, given, model=model):
        before = inside_view(model)
        made[name] = message_of(mc.apply_compression, model, policy(**given) if isinstance(given, dict) else given)
        assert inside_view(model) == before, name

    for name in ON_ONE_RANK:
        attempt(name, files / name if rank == 1 else {})
    attempt("levels", {"algorithm": "hierarchical"} if rank == 1 else {"algorithm": "two_step"})
    attempt("islands", {"algorithm": "hierarchical", "islands": [[0], [1, 2]] if rank == 1 else [[0, 1], [2]]})
    attempt("no policy", 5 if rank == 1 else {})
    with patch("megatron.core.__version__", "0.15.0" if rank == 1 else "0.16.1"):
        attempt("old Megatron", {})
    with patch.object(apply, "compile_kernels", side_effect=RuntimeError("no compiler") if rank == 1 else None):
        attempt("no compiler", {})

    attempt("layers", {"layers": {"2-4": "none"}})
    for site in KEPT_EXPERTS:
        attempt(f"sites {site}", {"sites": {site: "mxfp8"}})
        attempt(f"layers {site}", {"layers": {1: {site: "mxfp8"}}})
    attempt("policies", {"codec": "mxfp4" if rank < 2 else "mxfp6", "layers": {3: "none", "0-1": "mxfp8"}})
    attempt("one policy is wrong", {"layers": {4: "none"}} if rank == 1 else {})
    with patch.object(agreement, "__version__", "9.9.9" if rank == 0 else agreement.__version__):
        attempt("versions", {})
    attempt("no layers", {}, torch.nn.Linear(3, 3))
    before, calls = inside_view(model), []

    def fails(layer):
        calls.append(layer)
        if len(calls) == 2:
            raise ValueError("not this one")
        compress_layer(layer)

    with patch.object(apply, "compress_layer", fails), patch.object(apply, "can_overlap", lambda layer: layer in inner):
        inner = [*model.decoder.layers]
        made["in between"] = message_of(mc.apply_compression, model, policy())
    assert inside_view(model) == before
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
    model.decoder.layers[-1].mlp = TEFusedMLP()
    attempt("fused", {})
    return made


@pytest.fixture(scope="module")
def refusals(llama, files):
    return run_ranks(refused, RANKS, llama, files)


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
        ("in between", ["not this one"]),
        ("no layers", ["Linear has no row-parallel linear", "nothing to compress"]),
        ("bias", ["RowParallelLinear(in_features", "skip_bias_add=True"]),
        ("own class", ["OwnRowParallelLinear", "cannot be compressed"]),
        ("fused", ["use_te_op_fuser=True", "set it to False"]),
    ],
)
def test_every_rank_says_what_cannot_be_done_and_nothing_changes(refusals, name, told):
    for made in refusals:
        for part in told:
            assert part in made[name]


@pytest.mark.parametrize(
    "name, told",
    [
        ("one policy is wrong", "policy: layers: 4 is out of range"),
        *((name, told) for name, (_, told) in ON_ONE_RANK.items()),
        ("no policy", "TypeError: a policy is a CompressionPolicy, a policy file or a codec's name, not int"),
        ("old Megatron", "RuntimeError: Megatron-Core 0.15.0: 0.16 to 0.19 are supported"),
        ("no compiler", "RuntimeError: no compiler"),
    ],
)
def test_what_one_rank_finds_all_ranks_say(refusals, name, told):
    """One that left alone would have the others wait in their next collective, up to its timeout."""
    (said,) = {made[name] for made in refusals}
    assert said.startswith("rank 1: ") and told in said


@pytest.mark.parametrize("name", ["levels", "islands"])
def test_policies_that_ask_for_other_collectives_differ(refusals, name):
    (said,) = {made[name] for made in refusals}
    assert said.startswith("compression differs between tensor-parallel ranks: rank 0: ") and "; rank 1: " in said


def test_a_refused_policy_leaves_the_old_one(refusals):
    assert all(made["stays compressed"] == 2 * LAYERS for made in refusals)


def not_of_this_model(rank, world_size):
    """Words for sites that a mixture of experts has not, or not in every layer."""
    init_parallel(world_size)
    made = {}
    for name, layers, options, words in (
        ("mlp", [1, 1], {}, {"sites": {"mlp": "mxfp8"}}),
        ("mlp of a layer", [1, 1], {}, {"layers": {1: {"mlp": "mxfp8"}}}),
        ("mlp of another layer", [0, 1], {}, {"sites": {"mlp": "mxfp8"}}),
        ("shared", [1, 1], {}, {"sites": {"shared_experts": "mxfp8"}}),
        ("shared here", [1, 1], {"moe_shared_expert_intermediate_size": 32}, {"sites": {"shared_experts": "mxfp8"}}),
        ("nothing", [1, 1], {}, {"sites": {"mlp": "none", "shared_experts": "none"}}),
    ):
        made[name] = message_of(mc.apply_compression, experts_model(layers, **options), policy(**words))
    return made


@pytest.fixture(scope="module")
def sites_said():
    return run_ranks(not_of_this_model, 2)


@pytest.mark.parametrize(
    "name, told",
    [
        ("mlp", "policy: sites: the model has no mlp"),
        ("mlp of a layer", "policy: layers: 1: the model has no mlp"),
        ("mlp of another layer", "no error"),
        ("shared", "policy: sites: the model has no shared_experts"),
        ("shared here", "no error"),
        ("nothing", "no error"),
    ],
)
def test_a_mixture_of_experts_has_the_sites_of_its_layers(sites_said, name, told):
    assert all(made[name] == told for made in sites_said)


def unable(rank, world_size):
    """name -> what was said to a model whose experts' sums cannot be compressed, which is as it was afterwards."""
    init_parallel(world_size)
    pair, shared = {"codec": "mxfp4>mxfp8"}, {"moe_shared_expert_intermediate_size": 32}
    overlap = shared | {"moe_shared_expert_overlap": True, "moe_token_dispatcher_type": "alltoall"}
    padded = {"moe_token_dispatcher_type": "alltoall", "moe_expert_capacity_factor": 1.0}
    padded |= {"moe_pad_expert_input_to_capacity": True}
    scattered = {"sequence_parallel": True}
    made = {}

    def attempt(name, words, change=lambda layer: None, **options):
        model = experts_model(**options)
        change(model.decoder.layers[-1].mlp)
        before = inside_view(model)
        made[name] = message_of(mc.apply_compression, model, policy(**words))
        if made[name] != "no error":
            assert inside_view(model) == before, name

    def flex(layer):
        layer.token_dispatcher.__class__ = MoEFlexTokenDispatcher

    def optimized(layer):
        layer._inference_token_dispatcher = layer.token_dispatcher

    def own_shared(layer):
        layer.shared_experts.__class__ = OwnSharedExperts

    def fused_shared(layer):
        layer.shared_experts.__class__ = getattr(shared_experts, "FusedSharedExpertMLP", FusedSharedExpertMLP)

    for name, change, options in (
        ("flex", flex, {}),
        ("optimized", optimized, {}),
    ):
        attempt(name, {}, change, **options)
        attempt(f"{name}, one layer", {"codec": "none", "layers": {1: {"experts": "mxfp8"}}}, change, **options)
        attempt(f"{name}, other layer", {"codec": "none", "layers": {0: {"experts": "mxfp8"}}}, change, **options)
        attempt(f"{name}, experts kept", {"sites": {"experts": "none"}}, change, **options)
        attempt(f"{name}, in decode", {"phases": {"prefill": "none"}}, change, **options)
    attempt("padded", {}, **padded, **scattered)
    attempt("padded, whole tokens", {}, **padded)
    attempt("pair", pair, **scattered)
    attempt("pair for experts", {"sites": {"experts": pair["codec"]}}, **scattered)
    attempt("pair for experts, alltoall", {"sites": {"experts": pair["codec"]}}, **scattered, **overlap)
    attempt("pair, whole tokens", pair)
    attempt("own shared", {}, own_shared, **overlap)
    attempt("own shared, kept", {"sites": {"shared_experts": "none"}}, own_shared, **overlap)
    for name, options in (("fused shared", shared), ("fused shared, overlapped", overlap)):
        attempt(name, {}, fused_shared, **options)
        attempt(f"{name}, kept", {"sites": {"shared_experts": "none"}}, fused_shared, **options)
    attempt("own shared, not overlapped", {}, own_shared, **shared)
    attempt("pair for shared", {"sites": {"shared_experts": pair["codec"]}}, **scattered, **overlap)
    return made


def unable_with_expert_parallelism(rank, world_size):
    """Of two ranks, each with half of the experts."""
    init_parallel(1, expert_parallel=world_size)
    words = {"codec": "none", "sites": {"experts": "mxfp4>mxfp8"}}
    made = [message_of(mc.apply_compression, experts_model(), policy(**words))]
    model = experts_model(moe_token_dispatcher_type="alltoall")
    made.append(message_of(mc.apply_compression, model, policy(**words)))
    # As inference-optimized layers have it: all-to-all in training, which sums nothing, and a dispatcher that gathers.
    for layer, gathering in zip(model.decoder.layers, experts_model().decoder.layers, strict=True):
        layer.mlp._inference_token_dispatcher = gathering.mlp.token_dispatcher
    made.append(message_of(mc.apply_compression, model, policy(codec="none", sites={"experts": "mxfp4"})))
    made.append(message_of(mc.apply_compression, model, policy(sites={"experts": "none"})))
    return made


@pytest.fixture(scope="module")
def experts_said():
    return run_ranks(unable, 2)


OPTIMIZED = ["transformer_impl='inference_optimized'", "TokenDispatcher", "sites: {experts: none}"]
FLEX = ["MoEFlexTokenDispatcher cannot be compressed", "allgather or alltoall", "sites: {experts: none}"]
FUSED = ["FusedSharedExpertMLP are shared", "use_grouped_gemm_for_shared_expert=False", "{shared_experts: none}"]
PAIR = ["policy: experts: 'mxfp4>mxfp8': with sequence or expert parallelism", "one codec"]
PLAIN_PAIR = ["policy: 'mxfp4>mxfp8': sequence parallelism reduces in one phase and takes one codec"]


@pytest.mark.parametrize(
    "name, told",
    [
        *(
            (name + where, told)
            for name, told in (("flex", FLEX), ("optimized", OPTIMIZED))
            for where in ("", ", one layer", ", in decode")
        ),
        *(
            (f"{name}, {where}", ["no error"])
            for name in ("flex", "optimized")
            for where in ("experts kept", "other layer")
        ),
        ("padded", ["no error"]),
        ("padded, whole tokens", ["no error"]),
        ("pair", PLAIN_PAIR),
        ("pair for experts", PAIR),
        ("pair for experts, alltoall", PAIR),
        ("pair, whole tokens", ["no error"]),
        ("own shared", ["OwnSharedExperts are shared experts of a kind that cannot be compressed"]),
        ("own shared, kept", ["no error"]),
        ("own shared, not overlapped", ["no error"]),
        ("fused shared", FUSED),
        ("fused shared, overlapped", FUSED),
        ("fused shared, kept", ["no error"]),
        ("fused shared, overlapped, kept", ["no error"]),
        ("pair for shared", PLAIN_PAIR),
    ],
)
def test_experts_that_cannot_be_compressed(experts_said, name, told):
    for made in experts_said:
        for part in told:
            assert part in made[name]


def test_expert_parallelism_takes_one_codec_where_it_sums():
    for gathers, sends, *_ in run_ranks(unable_with_expert_parallelism, 2):
        assert all(part in gathers for part in PAIR)
        assert sends == "no error"  # one rank for each expert: there is nothing to sum


def test_sums_of_inference_dispatchers_are_refused_over_expert_parallel_ranks_too():
    for *_, optimized, without_experts in run_ranks(unable_with_expert_parallelism, 2):
        assert all(part in optimized for part in OPTIMIZED)
        assert without_experts == "no error"


@pytest.mark.parametrize(
    "version, told", [("0.15.3", "0.16 to 0.19 are supported"), ("0.16.1", None), ("0.19.2+abc", None)]
)
def test_a_megatron_that_is_too_old(version, told):
    with patch("megatron.core.__version__", version):
        if told is None:
            assert "nothing to compress" in message_of(mc.apply_compression, torch.nn.Linear(2, 2), policy())
        else:
            with pytest.raises(RuntimeError, match=f"Megatron-Core {version}: {told}"):
                mc.apply_compression(torch.nn.Linear(2, 2), policy())


def test_a_megatron_that_is_newer_than_the_tests(caplog):
    with patch("megatron.core.__version__", "0.20.0"):
        assert "nothing to compress" in message_of(mc.apply_compression, torch.nn.Linear(2, 2), policy())
    assert "Megatron-Core 0.20.0: 0.16 to 0.19 are supported; a newer one may have sums" in caplog.text


def test_a_process_without_ranks():
    assert not dist.is_initialized()
    assert "nothing to compress" in message_of(mc.apply_compression, torch.nn.Linear(2, 2), policy())
