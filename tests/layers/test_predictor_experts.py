# SPDX-License-Identifier: Apache-2.0
"""Predicted sums of a mixture of experts: attention's in its layer, the experts' in its token dispatcher."""

import predictors
import pytest
import torch
from experts import DISPATCHERS, HIDDEN, INT8, LAYERS
from models import inside_view, message_of, policy
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference import cpu
from megatron_comp.inference.generate import generate, logits
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.search.sensitivity import attach_probes, measure_window
from megatron_comp.wire.codec import parse_codec

RANKS = 2
SITES = {"both": ("attention", "experts"), "experts": ("experts",), "attention": ("attention",)}
DROP = {0: {"attention": "drop"}}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictors")
    made = {name: predictors.tensors(LAYERS, HIDDEN, RANKS, sites=sites) for name, sites in SITES.items()}
    made["far"] = predictors.tensors(LAYERS, HIDDEN, RANKS, sites=["experts"], scale=2.0)
    return {name: predictors.write(folder / name, tensors, RANKS) for name, tensors in made.items()}


def in_ranks(rank, world_size, ref, files):
    init_parallel(world_size)
    cpu.prepare_streams()
    made = {}
    for dispatcher in DISPATCHERS:
        model = build_model(ref.folder, token_dispatcher=dispatcher)

        def said(model=model):
            return logits(model, ref.ids, gather=True)

        made[dispatcher, "stock"], view = said(), inside_view(model)
        for name in SITES:
            mc.apply_compression(model, policy(codec=INT8, predictor=files[name]))
            made[dispatcher, name] = said()
            made[dispatcher, name, "sums"] = sum(site.compressed.calls for site in mc.stats(model).sites)
            made[dispatcher, name, "tokens"] = generate(model, ref.prompt, 4).tokens
        for name, file in {"gated": None, "gated, predicted": files["both"]}.items():
            mc.apply_compression(model, policy(codec=INT8, min_bytes=1 << 30, predictor=file))
            made[dispatcher, name] = said()
        for name in ("none", "far"):
            mc.apply_compression(model, policy(codec=INT8, predictor=files.get(name)))
            made[dispatcher, name, "error"] = (said() - made[dispatcher, "stock"]).abs().mean()
            probes = attach_probes(model, (parse_codec(INT8),), predictor=files.get(name))
            measure_window(model, ref.ids[0], 0)
            made[dispatcher, name, "damage"] = sum(float(each.damage[0]) for each in probes if each.site == "experts")
        made[dispatcher, "dropped"] = message_of(mc.apply_compression, model, policy(layers=DROP))
        mc.remove_compression(model)
        assert inside_view(model) == view
        made[dispatcher, "removed"] = said()
    return made


@pytest.fixture(scope="module")
def ranks(mixtrals, files):
    return run_ranks(in_ranks, RANKS, mixtrals[4], files)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("name", SITES)
def test_what_is_predicted_and_what_is_sent_add_up(ranks, dispatcher, name):
    for made in ranks:
        says, stock = made[dispatcher, name], made[dispatcher, "stock"]
        assert torch.equal(says, ranks[0][dispatcher, name]) and not torch.equal(says, stock)
        assert predictors.is_near(says, stock)
        assert made[dispatcher, name, "sums"] == 2 * LAYERS  # as many as without predictors, and all of them compressed
        assert made[dispatcher, name, "tokens"] == ranks[0][dispatcher, name, "tokens"]


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_sums_that_travel_exactly_are_not_predicted(ranks, dispatcher):
    for made in ranks:
        assert torch.equal(made[dispatcher, "gated, predicted"], made[dispatcher, "gated"])
        assert torch.equal(made[dispatcher, "removed"], made[dispatcher, "stock"])


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_the_prediction_is_taken_off_what_is_sent(ranks, dispatcher):
    """With predictions far larger than the sums, what int8 rounds is far larger too; sensitivities tell of it."""
    made = ranks[0]
    assert made[dispatcher, "far", "error"] > 5 * made[dispatcher, "none", "error"]
    assert made[dispatcher, "far", "damage"] > 25 * made[dispatcher, "none", "damage"] > 0


def test_attention_of_a_mixture_is_not_dropped(ranks):
    for made in ranks:
        for dispatcher in DISPATCHERS:
            assert "in a mixture of experts ranks would choose different experts" in made[dispatcher, "dropped"]


def message_with_spread_experts(rank, world_size, folder, file):
    init_parallel(1, expert_parallel=world_size)
    cpu.prepare_streams()
    return message_of(mc.apply_compression, build_model(folder), policy(codec=INT8, predictor=file))


def test_experts_that_are_spread_over_ranks_are_refused(mixtrals, tmp_path):
    file = predictors.write(tmp_path / "one", predictors.tensors(LAYERS, HIDDEN, 1, sites=["experts"]), 1)
    for message in run_ranks(message_with_spread_experts, RANKS, mixtrals[4].folder, file):
        assert "layer 0: its sums cannot be predicted" in message and "leave out expert parallelism" in message
