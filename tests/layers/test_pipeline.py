# SPDX-License-Identifier: Apache-2.0
"""A model in two pipeline stages: a policy counts its layers over the whole model, and every stage does its own."""

import copy

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from models import message_of, policy
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference import cpu
from megatron_comp.inference.attention import CausalAttention
from megatron_comp.layers.logits import gathers

TP, STAGES, LAYERS, HIDDEN = 2, 2, 4, 64
IDS = torch.arange(22).view(2, 11)

POLICIES = {
    "none": {"codec": "none"},
    "everywhere": {"algorithm": "gather_sum"},
    # Something else in every layer, so that a layer counted wrongly shows.
    "by layer": {
        "codec": "none",
        "layers": {0: "int8:32:fp16", "1": {"mlp": "mxfp4"}, 2: "int5:32:fp16", 3: {"attention": "nvfp4"}},
    },
    "first stage": {"codec": "none", "layers": {"0-1": "mxfp4"}},
    "second stage": {"codec": "none", "layers": {"2-3": "mxfp4"}},
}


def build(stages, experts_in=()):
    """The part of a random model that this rank's stage has, after Megatron's groups are made anew."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(TP, stages)
    model_parallel_cuda_manual_seed(1, inference_rng_tracker=True, force_reset_rng=True)
    mixture = {
        "num_moe_experts": 2,
        "moe_layer_freq": [int(layer in experts_in) for layer in range(LAYERS)],
        "moe_token_dispatcher_type": "allgather",
    }
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        add_bias_linear=False,
        tensor_model_parallel_size=TP,
        pipeline_model_parallel_size=stages,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        **(mixture if experts_in else {}),
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = CausalAttention
    model = GPTModel(
        config,
        spec,
        vocab_size=32,
        max_sequence_length=32,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
    )
    return model.eval()


def part_of(whole, stage):
    """State of the whole model as that of a stage, where layers are numbered from 0 again."""
    first, state = stage * LAYERS // STAGES, {}
    for name, value in whole.items():
        head, mark, tail = name.partition("decoder.layers.")
        number, _, rest = tail.partition(".")
        if not mark:
            state[name] = value
        elif first <= int(number) < first + LAYERS // STAGES:
            state[f"{head}{mark}{int(number) - first}.{rest}"] = value
    return state


@torch.no_grad()
def forward(model):
    """Logits, or None from the first of two stages."""
    positions = torch.arange(IDS.shape[1]).expand_as(IDS)
    rank, first, last = dist.get_rank(), model.pre_process, model.post_process
    if not first:
        received = torch.empty(IDS.shape[1], IDS.shape[0], HIDDEN)
        dist.recv(received, rank - TP)
        model.set_input_tensor(received)
    out = model(IDS, positions, None, runtime_gather_output=True)
    if last:
        return out
    dist.send(out.contiguous(), rank + TP)
    return None


def both(rank, world_size):
    cpu.prepare()
    made, whole = {}, build(1)
    torch.manual_seed(parallel_state.get_tensor_model_parallel_rank())
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    for source in whole.parameters():  # what is not split must be the same on both ranks
        if not getattr(source, "tensor_model_parallel", False):
            dist.broadcast(source.data, rank // TP * TP, group=parallel_state.get_tensor_model_parallel_group())
    # Both pairs of ranks hold one model: what the first pair drew.
    for source in whole.parameters():
        dist.broadcast(source.data, rank % TP, group=parallel_state.get_data_parallel_group())
    state = copy.deepcopy(whole.state_dict())
    made["whole"] = {"stock": forward(whole)}
    for name, words in POLICIES.items():
        mc.apply_compression(whole, policy(**words))
        made["whole"][name] = forward(whole)
    stage = build(STAGES)
    missing, unexpected = stage.load_state_dict(part_of(state, rank // TP), strict=False)
    assert not [name for name in missing if "_extra_state" not in name], missing
    made["stock"] = forward(stage)
    for name, words in POLICIES.items():
        mc.apply_compression(stage, policy(**words))
        made[name] = forward(stage)
        made[f"{name} stats"] = copy.deepcopy(mc.stats(stage))
    mc.apply_compression(stage, policy(codec="none", logits=3))
    stage.compression_hook.remove()  # it would call a forward without a context a prefill
    for gather in gathers(stage):
        gather.phase.name = "decode"
    made["candidates"], made["candidates stats"] = forward(stage), copy.deepcopy(mc.stats(stage))
    made["out of range"] = message_of(mc.apply_compression, stage, policy(layers={LAYERS: "none"}))
    made["no experts"] = message_of(mc.apply_compression, stage, policy(sites={"experts": "mxfp8"}))
    made["ranks differ"] = message_of(mc.apply_compression, stage, policy(codec=["mxfp4", "mxfp8"][rank % TP]))
    return made


@pytest.fixture(scope="module")
def staged():
    return run_ranks(both, TP * STAGES)


def test_stages_without_compression_are_the_whole_model(staged):
    for made in staged[TP:]:
        assert torch.equal(made["stock"], made["whole"]["stock"])
        assert torch.equal(made["none"], made["stock"])


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "none"])
def test_stages_compress_what_the_whole_model_does(staged, name):
    for made in staged[TP:]:
        assert torch.equal(made[name], made["whole"][name])
        assert not torch.equal(made[name], made["stock"])
        assert (made[name] - made["stock"]).abs().mean() < made["stock"].std() / 2


def test_a_stage_counts_its_own_layers(staged):
    for rank, made in enumerate(staged):
        mine = [2 * (rank // TP), 2 * (rank // TP) + 1]
        assert [site.layer for site in made["everywhere stats"].sites] == [mine[0]] * 2 + [mine[1]] * 2
        assert made["everywhere stats"].compressed.calls == 4
        first, second = made["first stage stats"], made["second stage stats"]
        here, elsewhere = (first, second) if rank < TP else (second, first)
        assert (here.compressed.calls, here.kept.calls) == (4, 0)
        assert (elsewhere.compressed.calls, elsewhere.kept_because) == (0, {"policy": 4})


def test_the_last_stage_gathers_candidates(staged):
    for made in staged[:TP]:
        assert {site.site for site in made["candidates stats"].sites} == {"attention", "mlp"}
    for made in staged[TP:]:
        stock, ours, site = made["stock"], made["candidates"], made["candidates stats"].sites[-1]
        assert (site.site, dict(site.algorithms)) == ("logits", {"candidates": 1})
        assert torch.equal(ours.argmax(-1), stock.argmax(-1)) and torch.equal(ours.topk(3)[0], stock.topk(3)[0])
        assert (ours > -torch.inf).sum() == IDS.numel() * TP * 3


def test_what_a_model_does_not_have_is_an_error_on_every_stage(staged):
    for made in staged:
        assert made["out of range"] == "policy: layers: 4 is out of range; the model has layers 0 to 3"
        assert made["no experts"] == "policy: sites: the model has no experts"
        assert made["ranks differ"].startswith("compression differs between tensor-parallel ranks: rank 0: version")


def experts_in_one_stage(rank, world_size, layer):
    cpu.prepare()
    model = build(STAGES, experts_in=[layer])
    words = {"sites": {"experts": "int8:32:fp16"}, "layers": {layer: {"experts": "mxfp8"}}}
    mc.apply_compression(model, policy(**words))
    forward(model)
    absent = message_of(mc.apply_compression, model, policy(sites={"shared_experts": "mxfp8"}))
    return {site.site: site.compressed.calls for site in mc.stats(model).sites}, absent


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_a_site_that_only_another_stage_has_is_no_error(layer):
    """Whole models mix layers with experts and without; the policy is one for all stages."""
    for rank, (calls, absent) in enumerate(run_ranks(experts_in_one_stage, TP * STAGES, layer)):
        mine = rank // TP == layer * STAGES // LAYERS
        assert calls == ({"attention": 1, "mlp": 1, "experts": 1} if mine else {"attention": 1, "mlp": 1})
        assert absent == "policy: sites: the model has no shared_experts"
