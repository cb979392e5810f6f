# SPDX-License-Identifier: Apache-2.0
"""Blocks of a mixture of experts in one process: each rank's partial sums against Megatron's, both layouts on disk."""

import pytest
import torch
from checkpoints import tiny_mixtral
from models import policy
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference import hf
from megatron_comp.inference.generate import logits
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.layers.reducer import Reducer
from megatron_comp.spd.block import check_can_drop, stream
from megatron_comp.spd.regression import partial_sums

RANKS = 2
IDS = torch.randint(0, 128, (4, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=[False, True], ids=["experts", "fused"])
def mixtral(request, tmp_path_factory):
    return tiny_mixtral(tmp_path_factory.mktemp("mixtral"), experts=8, fused=request.param, num_hidden_layers=2)


def sums_of_rank(rank, world_size, folder):
    """Of the first layer, whose input is the same everywhere: what it sends, by site `[windows, context, hidden]`."""
    init_parallel(world_size)
    model, seen, summed = build_model(folder), {}, Reducer.__call__

    def note(self, partial, *how, **more):
        seen.setdefault((self.layer, self.site), partial.clone())
        return summed(self, partial, *how, **more)

    Reducer.__call__ = note
    mc.apply_compression(model, policy(codec="int8:32:fp32", sites={"attention": "none"}))
    logits(model, IDS)
    by_sequence = IDS.shape[1], IDS.shape[0], -1
    return {site: seen[0, site].reshape(by_sequence).transpose(0, 1) for site in ("attention", "experts")}


def streamed(folder):
    config = hf.read_config(folder)
    with hf.Checkpoint(folder) as checkpoint:
        return list(stream(checkpoint, config, IDS, range(2)))


def test_partial_sums_are_megatrons(mixtral):
    (block, x, _, rope), _ = streamed(mixtral)
    ours = {site: partials for site, _, partials in partial_sums(block, x, rope, RANKS)}
    for rank, sent in enumerate(run_ranks(sums_of_rank, RANKS, mixtral)):
        assert ours.keys() == sent.keys()
        for site, expected in sent.items():
            torch.testing.assert_close(ours[site][rank], expected, atol=1e-5, rtol=1e-4)


def test_blocks_in_turn_are_the_model(mixtral):
    from transformers import AutoModelForCausalLM

    *_, (_, _, last, _) = streamed(mixtral)
    model = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32).eval()
    seen = []
    model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(IDS)
    torch.testing.assert_close(last, seen[0], atol=1e-4, rtol=1e-4)


def test_drops_are_refused(mixtral):
    with pytest.raises(ValueError, match="mixture of experts cannot do without attention's sum"):
        check_can_drop(hf.read_config(mixtral))
