# SPDX-License-Identifier: Apache-2.0
"""What no policy reaches: named in one warning and in `stats`, and left as it is."""

import contextlib
import io
import logging

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import RowParallelLinear, reduce_from_tensor_model_parallel_region
from models import LAYERS, all_logits, policy
from ranks import run_ranks
from vision import IMAGE, LANGUAGE_LAYERS, TOKENS, VISION_LAYERS, llava, small_config

import megatron_comp as mc
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.layers.hook import Hook
from megatron_comp.layers.not_recognised import shortened
from megatron_comp.layers.places import find_places


class OwnSum(torch.nn.Module):
    """Somebody's module that reduces by itself, in a function inside of a method."""

    def forward(self, x):
        return (lambda y: reduce_from_tensor_model_parallel_region(y))(x)


class OwnRowLinear(torch.nn.Module):
    """As a linear of Transformer Engine's that Megatron does not wrap."""

    parallel_mode = "row"


class Records(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


@contextlib.contextmanager
def warnings_of_apply():
    handler, logger = Records(), logging.getLogger("megatron_comp.layers.agreement")
    logger.addHandler(handler)
    yield handler.said
    logger.removeHandler(handler)


def with_others(model):
    """Sums outside of layers, and inside of one, that nobody here knows."""
    fc2 = model.decoder.layers[0].mlp.linear_fc2
    how = {"input_is_parallel": True, "config": fc2.config, "init_method": fc2.config.init_method}
    model.head = RowParallelLinear(fc2.input_size, fc2.output_size, bias=False, skip_bias_add=True, **how)
    model.heads = torch.nn.ModuleList(OwnSum() for _ in range(2))
    model.decoder.layers[1].adapter = OwnRowLinear()
    return model


def others(rank, world_size, folder):
    init_parallel(world_size)
    made = {"plain": mc.stats(build_model(folder)).not_recognised}
    model = with_others(build_model(folder))
    made["before"] = mc.stats(model).not_recognised
    with warnings_of_apply() as made["warnings"]:
        mc.apply_compression(model, policy(algorithm="two_step"))
    logits = all_logits(model)
    made["stats"] = mc.stats(model)
    expected = all_logits(mc.apply_compression(build_model(folder), policy(algorithm="two_step")))
    made["same"] = torch.equal(logits, expected)
    mc.apply_compression(model, policy(sites={"attention": "none"}))
    made["uncompressed by the policy"] = mc.stats(model).not_recognised
    return made


NAMES = [
    "decoder.layers.1.adapter (OwnRowLinear)",
    "head (RowParallelLinear)",
    "heads.0 (OwnSum)",
    "heads.1 (OwnSum)",
]


def test_others_are_named_and_left(llama):
    for rank, made in enumerate(run_ranks(others, 2, llama)):
        assert made["plain"] == []
        for when in (made["before"], made["stats"].not_recognised, made["uncompressed by the policy"]):
            assert sorted(when) == NAMES
        assert made["stats"].compressed.calls == 2 * LAYERS and made["same"]
        assert "; 4 sums of the model are not recognised and not counted" in str(made["stats"])
        if rank == 0:
            (warning,) = made["warnings"]
            assert "4 sums of GPTModel are not recognised and stay uncompressed" in warning
            assert "head (RowParallelLinear)" in warning and "decoder.layers.*.adapter (OwnRowLinear)" in warning
        else:
            assert made["warnings"] == []


def test_one_rank_has_nothing_to_recognise(llama):
    (made,) = run_ranks(others, 1, llama)
    assert made["before"] == made["warnings"] == made["stats"].not_recognised == []


def test_names_that_differ_in_numbers_are_one():
    assert shortened(["a.0.b (C)", "a.11.b (C)", "a.0.b2 (C)"]) == "a.*.b (C), a.*.b2 (C)"


@torch.no_grad()
def vision(rank, world_size):
    init_parallel(world_size)
    model, made = llava(), {}
    made["places"] = [(place.layer, place.site) for place in find_places(model)]
    pixels = torch.randn(1, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(1))

    def see():
        return model.vision_model(pixels, torch.zeros(1, 1, TOKENS, TOKENS, dtype=torch.bool))

    made["stock"] = see()
    with warnings_of_apply() as made["warnings"]:
        mc.apply_compression(model, policy(layers={0: "none"}))
    made["whole"] = mc.stats(model)
    made["tower left"] = torch.equal(see(), made["stock"])
    mc.apply_compression(model.vision_model, policy(codec="int8:32:fp16"))
    made["tower"] = see()
    made["tower stats"], made["both"] = mc.stats(model.vision_model), mc.stats(model)
    mc.remove_compression(model)
    made["removed"] = see()

    hook, said = Hook(policy()), io.StringIO()
    with contextlib.redirect_stderr(said):
        hook.install()
        llava()
    made["hook"] = said.getvalue(), hook.report()
    return made


@pytest.fixture(scope="module")
def seen():
    return run_ranks(vision, 2)


LANGUAGE = [(layer, site) for layer in range(LANGUAGE_LAYERS) for site in ("attention", "mlp")]
TOWER = [(layer, site) for layer in range(VISION_LAYERS) for site in ("attention", "mlp")]


def test_a_policy_is_of_the_language_model(seen):
    for made in seen:
        assert made["places"] == [(site.layer, site.site) for site in made["whole"].sites] == LANGUAGE
        left = made["whole"].not_recognised
        assert len(left) == len(TOWER) + 1 and "vision_projection.encoder.linear_fc2 (RowParallelLinear)" in left
        assert sum(name.startswith("vision_model.decoder.layers.") for name in left) == len(TOWER)
        assert made["tower left"]
    assert len(seen[0]["warnings"]) == 1 and "5 sums of LLaVAModel" in seen[0]["warnings"][0]


def test_a_vision_tower_takes_a_policy_of_its_own(seen):
    for made in seen:
        assert [(site.layer, site.site) for site in made["tower stats"].sites] == TOWER
        assert made["tower stats"].compressed.calls == len(TOWER) and made["tower stats"].not_recognised == []
        assert made["both"].not_recognised == ["vision_projection.encoder.linear_fc2 (RowParallelLinear)"]
        assert [(site.layer, site.site) for site in made["both"].sites] == LANGUAGE
        assert 0 < (made["tower"] - made["stock"]).norm() / made["stock"].norm() < 0.05
        assert torch.equal(made["tower"], seen[0]["tower"]) and torch.equal(made["removed"], made["stock"])


def test_the_hook_says_what_it_left(seen):
    said, problem = seen[0]["hook"]
    assert problem is None
    assert "GPTModel: 6 of 6 sums have a codec" in said
    assert "CLIPViTModel: 4 sums are not recognised and stay uncompressed: decoder.layers.*.self_attention" in said
    assert "MultimodalProjector: 1 sums are not recognised and stay uncompressed: encoder.linear_fc2" in said


def further_tokens(rank, world_size):
    """Places of a model with two layers, and two depths of further tokens."""
    init_parallel(world_size)
    config = small_config(2, mtp_num_layers=2)
    spec = get_gpt_layer_local_spec()
    further = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
    model = GPTModel(config, spec, 32, 32, mtp_block_spec=further, position_embedding_type="rope")
    made = {"places": [(place.layer, place.site) for place in find_places(model)]}
    mc.apply_compression(model, policy(codec="none", layers={"2-3": "mxfp8"}))
    compressed = [place.module for place in find_places(model) if place.module.reducer.codecs]
    inside = {id(module) for module in model.mtp.modules()}
    made["further"] = [id(module) in inside for module in compressed]
    with pytest.raises(ValueError, match="layers: 4 is out of range"):
        mc.apply_compression(model, policy(layers={4: "none"}))
    made["others"] = mc.stats(model).not_recognised
    return made


def test_layers_of_further_tokens_have_numbers_of_their_own():
    for made in run_ranks(further_tokens, 2):
        assert made["places"] == [(layer, site) for layer in range(4) for site in ("attention", "mlp")]
        assert made["further"] == [True] * 4 and made["others"] == []


def nothing_known(rank, world_size, folder):
    """What the hook says of a model whose linears are all of an unknown kind, and of a stage without layers."""
    init_parallel(world_size)
    model = build_model(folder)
    hook, end = Hook(policy()), Hook(policy())
    for layer in model.decoder.layers:
        layer.self_attention.linear_proj, layer.mlp.linear_fc2 = OwnRowLinear(), OwnRowLinear()
    model.config.pipeline_model_parallel_size = 2
    hook._built(model)
    said = hook.report()
    model.decoder.layers = torch.nn.ModuleList()
    end._built(model)
    return said, end.report(), Hook(policy()).report()


def test_a_model_without_a_known_sum_is_told_from_no_model(llama):
    for built, end, none in run_ranks(nothing_known, 2, llama):
        assert built.startswith("GPTModel was built, but none of its sums is recognised: nothing was compressed")
        assert "decoder.layers.*.mlp.linear_fc2 (OwnRowLinear)" in built
        assert end is None and none.startswith("no Megatron language model was built")
