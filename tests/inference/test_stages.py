# SPDX-License-Identifier: Apache-2.0
"""Real models in pipeline stages: the tokens, logits and judgements of one rank, whatever the stages and chunks."""

import json
import math
import shutil

import pytest
import torch
from characters import character_llama
from checkpoints import tiny_mixtral
from models import message_of
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from megatron_comp.inference import checkpoint, chunks, stages
from megatron_comp.inference.generate import generate, logits
from megatron_comp.inference.model import build_model, destroy_parallel, init_parallel
from megatron_comp.inference.shards import check_pipeline_parallel, layers_of_stages
from megatron_comp.layers.apply import apply_compression, stats
from megatron_comp.policy import CompressionPolicy
from megatron_comp.quality.judge import Judge, Trial

SHAPE = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
HIDDEN, NEW = 64, 6
LAYOUTS = {"TP=2, PP=2": (2, 2), "PP=4": (1, 4)}
# Something else in every layer, so that a layer counted wrongly shows.
POLICY = CompressionPolicy(
    codec="int8:32:fp16", algorithm="gather_sum", min_bytes=0, layers={0: "none", 2: {"mlp": "none"}}, logits=4
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tied and untied embeddings, of layers and tokens that stages and ranks cannot share out evenly, and a mixture."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "tied": character_llama(folder / "tied", tie_word_embeddings=True, **SHAPE),
        "untied": character_llama(folder / "untied", vocab_size=131, **SHAPE | {"num_hidden_layers": 6}),
        "mixture": tiny_mixtral(folder / "mixture", num_hidden_layers=4),
    }


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(0, 128, (77,), generator=torch.Generator().manual_seed(1)).tolist()


def whole(rank, world_size, models, prompt):
    init_parallel(1)
    made = {}
    for name, folder in models.items():
        model = build_model(folder)
        made[name] = generate(model, prompt, NEW).tokens, logits(model, torch.tensor([prompt]), gather=True)
    return made


def in_stages(rank, world_size, models, prompt, distributed):
    made = {}
    chunks.LEAST_TOKENS = 8  # the prompt is then 8 chunks of 10 tokens with two stages, and 10 of 8 with four
    for layout, (tp, pp) in LAYOUTS.items():
        destroy = destroy_parallel if layout == list(LAYOUTS)[-1] else _groups_only
        init_parallel(tp, pipeline_parallel=pp)
        for name, folder in models.items():
            model = build_model(folder, sequence_parallel=name == "untied")
            tokens = generate(model, prompt, NEW).tokens
            out = logits(model, torch.tensor([prompt]), gather=True)
            made[layout, name] = tokens, out, [layer.layer_number for layer in model.decoder.layers]
        if tp > 1:
            checkpoint.save(build_model(models["tied"]), distributed)
            if rank == 0:
                shutil.copy(models["tied"] / "config.json", distributed)
            torch.distributed.barrier()
        else:
            made["distributed"] = generate(build_model(distributed), prompt, NEW).tokens
        model = build_model(models["tied"])
        apply_compression(model, POLICY)
        compressed = generate(model, prompt, NEW).tokens
        own = stats(model)
        made[layout, "stats"] = compressed, own, stages.stats_of_all(model, own, len(prompt) + NEW - 1)
        judge = Judge(model, torch.tensor(prompt[:76]).view(2, 38))
        made[layout, "judged"] = judge.judge([Trial("int8", POLICY)], "")
        damaged = models["tied"].parent / "damaged"
        made[layout, "message"] = [message_of(generate, build_model(damaged), prompt, 2)]
        made[layout, "message"].append(message_of(logits, build_model(damaged), torch.tensor([prompt])))
        made[layout, "groups"] = message_of(init_parallel, pp * tp, pipeline_parallel=1)
        destroy()
    return made


def _groups_only():
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


@pytest.fixture(scope="module")
def both(models, prompt, tmp_path_factory):
    damaged = character_llama(models["tied"].parent / "damaged", tie_word_embeddings=True, **SHAPE)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"].view(-1)[-1] = math.nan
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    distributed = tmp_path_factory.mktemp("distributed")
    return run_ranks(whole, 1, models, prompt)[0], run_ranks(in_stages, 4, models, prompt, distributed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["tied", "untied", "mixture"])
def test_tokens_and_logits_are_those_of_one_rank(both, layout, name):
    one, ranks = both
    tp, pp = LAYOUTS[layout]
    bounds = {2: (0, 3, 6), 4: (0, 1, 3, 5, 6)}[pp] if name == "untied" else range(0, 5, 4 // pp)
    for rank, made in enumerate(ranks):
        tokens, out, layers = made[layout, name]
        stage = rank // tp
        assert tokens == one[name][0]
        assert layers == [number + 1 for number in range(bounds[stage], bounds[stage + 1])]
        if stage < pp - 1:
            assert out is None
        else:  # in fp32, sums over ranks in another order
            assert torch.allclose(out, one[name][1], rtol=0, atol=1e-5 * float(one[name][1].abs().max()))


def test_a_distributed_checkpoint_is_read_in_other_stages_than_wrote_it(both):
    one, ranks = both
    assert all(made["distributed"] == one["tied"][0] for made in ranks)


def test_counts_are_of_all_stages(both):
    _, ranks = both
    layout, received = "TP=2, PP=2", []
    for rank, made in enumerate(ranks):
        tokens, own, (every, most) = made[layout, "stats"]
        assert tokens == ranks[0][layout, "stats"][0] and most == ranks[0][layout, "stats"][2][1]
        assert sorted({site.layer for site in own.sites if site.layer is not None}) == [[0, 1], [2, 3]][rank // 2]
        assert [site.layer for site in every.sites if site.site == "mlp"] == [0, 1, 2, 3]
        # Eight chunks and five tokens, two sums per layer; the last stage's gathers of logits are stock in prefill.
        assert every.compressed.calls == 5 * 13 + 5 and every.kept.calls == 3 * 13 + 8
        received.append(own.received_bytes + (77 + 5) * HIDDEN * 4 * (rank // 2))
    assert max(received) == ranks[0][layout, "stats"][2][1]


def test_judgements_are_those_of_the_last_stage_on_all(both):
    _, ranks = both
    for layout in LAYOUTS:
        base, judged = ranks[0][layout, "judged"]
        for made in ranks:
            for one, other in zip((base, judged), made[layout, "judged"]):
                assert (one.nll, one.kl, one.top1_agreement) == (other.nll, other.kl, other.top1_agreement)
                assert one.received_bytes == other.received_bytes
        assert sum(window.shape[1] for window in base.quality.windows) == 74 and base.kl == 0.0
        assert (judged.kl > 0) is (layout != "PP=4")  # one rank a stage has nothing to compress
        assert judged.kl < 1e-2
    assert ranks[0]["PP=4", "judged"][0].nll == pytest.approx(ranks[0]["TP=2, PP=2", "judged"][0].nll, abs=1e-5)


def test_what_is_not_finite_is_named_by_its_layer_in_the_whole_model(both):
    _, ranks = both
    for layout in LAYOUTS:
        for made in ranks:
            for message in made[layout, "message"]:
                assert "it began in layer 3, mlp (decoder.layers.3.mlp.linear_fc2), in float32: its weight" in message


def test_every_number_of_stages_shares_out_all_layers():
    assert layers_of_stages(30, 4) == [7, 8, 8, 7] and layers_of_stages(5, 2) == [3, 2]
    for layers in range(1, 40):
        for count in range(1, layers + 1):
            made = layers_of_stages(layers, count)
            assert (len(made), sum(made)) == (count, layers) and min(made) >= 1
            assert len(set(made[1:-1])) <= 1


def test_wrong_numbers_of_stages(both, models):
    _, ranks = both
    assert ranks[0]["TP=2, PP=2", "groups"] == "tensor_parallel is 4, but Megatron's groups stand with 2"
    assert ranks[0]["PP=4", "groups"] == "tensor_parallel is 4, but Megatron's groups stand with 1"
    config = type("Config", (), json.loads((models["tied"] / "config.json").read_text()))
    assert message_of(check_pipeline_parallel, config, 5) == "pipeline_parallel is 5, but this model has 4 layers"
