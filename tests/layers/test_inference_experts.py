# SPDX-License-Identifier: Apache-2.0
"""Experts' sums of inference-optimized layers: Megatron's own layer and NCCL dispatcher over gloo, experts of ours.

Their real experts are kernels for GPUs.
"""

import copy

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from models import experts_model, inside_view, message_of, policy
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference.model import init_parallel

inference = pytest.importorskip(
    "megatron.core.transformer.moe.token_dispatcher_inference", reason="Megatron-Core has it from 0.19 on"
)
RANKS, HIDDEN, INT8 = 2, 64, "int8:32:fp32"
OURS = {"reducer", "token_combine"}
TOKENS = {"equal": [4, 4], "different": [3, 6]}  # of each rank


class Experts(torch.nn.Module):
    """The weighted sum of what this rank's experts give, each of which multiplies by a number."""

    def forward(self, hidden, _tokens_per_expert, probs, routing_map):
        first = torch.distributed.get_rank() * 2
        mine = (routing_map >= first) & (routing_map < first + 2)
        return hidden * (probs * mine * (1 + routing_map)).sum(-1, keepdim=True).to(hidden), None


def optimized(training_dispatcher="alltoall"):
    model = experts_model(moe_token_dispatcher_type=training_dispatcher)
    for layer in model.decoder.layers:
        layer.mlp.config.inference_moe_token_dispatcher_type = "nccl"
        layer.mlp._setup_inference_mode(ProcessGroupCollection.use_mpu_process_groups())
        layer.mlp.experts = Experts()
    return model


class Router(torch.nn.Module):
    """Of the best two of four experts, as the inference router gives them: `[tokens, 2]` each."""

    def forward(self, hidden, *_):
        probs, routing_map = hidden.flatten(0, -2)[:, :4].softmax(-1).topk(2)
        return probs, routing_map


@torch.no_grad()
def forwards(rank, world_size):
    """(tokens, policy) -> what a layer gives under an engine, and what was counted."""
    from megatron.core.inference.utils import InferenceMode

    init_parallel(1, expert_parallel=world_size)
    dispatcher = inference.NCCLAllGatherDispatcher
    dispatcher.allocate_buffers()
    model, made = optimized(), {}
    layer = model.decoder.layers[0].mlp
    layer.router = Router()
    before, own = inside_view(model), set(vars(layer._inference_token_dispatcher))
    for tokens, counts in TOKENS.items():
        dispatcher._use_allgather_v = tokens == "different"
        x = torch.randn(counts[rank], 1, HIDDEN, generator=torch.Generator().manual_seed(rank)).bfloat16()

        def run(x=x):
            with InferenceMode.active():
                return layer(x)[0]

        made[tokens, "stock"] = run()
        for name, words in {
            "int8": {"codec": INT8},
            "none": {"codec": "none"},
            "small": {"min_bytes": 10**9},
        }.items():
            mc.apply_compression(model, policy(**words))
            made[tokens, name] = run()
            made[tokens, f"{name} stats"] = copy.deepcopy(mc.stats(model))
        mc.remove_compression(model)
        made[tokens, "removed"] = run()
    layer.token_dispatcher = layer._training_token_dispatcher
    made["restored"] = inside_view(model) == before and not (set(vars(layer._inference_token_dispatcher)) - own) & OURS
    made["pair"] = message_of(mc.apply_compression, model, policy(codec="none", sites={"experts": "mxfp4>mxfp8"}))
    made["gathers in training"] = message_of(mc.apply_compression, optimized("allgather"), policy())
    return made


@pytest.fixture(scope="module")
def seen():
    return run_ranks(forwards, RANKS)


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_sums_are_compressed(seen, tokens):
    for rank, made in enumerate(seen):
        stock, ours, stats = made[tokens, "stock"], made[tokens, "int8"], made[tokens, "int8 stats"]
        assert ours.shape == stock.shape == (TOKENS[tokens][rank], 1, HIDDEN) and ours.dtype == stock.dtype
        assert 0 < (ours - stock).float().norm() / stock.float().norm() < 0.02
        (site, _) = [site for site in stats.sites if site.site == "experts"]
        assert dict(site.algorithms) == {"reduce_scatter": 1} and site.kept.calls == 0
        assert site.compressed.values == sum(TOKENS[tokens]) * HIDDEN


@pytest.mark.parametrize("tokens", TOKENS)
def test_sums_that_stay_uncompressed_are_stock_and_counted(seen, tokens):
    for made in seen:
        for name, reason in (("none", "policy"), ("small", "min_bytes")):
            assert torch.equal(made[tokens, name], made[tokens, "stock"])
            (site, _) = [site for site in made[tokens, f"{name} stats"].sites if site.site == "experts"]
            assert site.kept_because == {reason: 1}
        assert torch.equal(made[tokens, "removed"], made[tokens, "stock"])


def test_removing_restores(seen):
    assert all(made["restored"] for made in seen)


def test_what_cannot_be_compressed_is_refused(seen):
    for made in seen:
        assert "with sequence or expert parallelism experts' sums are scattered in one phase" in made["pair"]
        assert "set moe_token_dispatcher_type to alltoall" in made["gathers in training"]
