# SPDX-License-Identifier: Apache-2.0
"""Sums of which only what the ranks cannot predict is sent: what they compute, when they do not, and bad files."""

import predictors
import pytest
import torch
from models import HIDDEN, IDS, LAYERS, all_logits, inside_view, message_of, policy
from predictors import is_near
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference.generate import generate, logits
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.layers.predictor_file import EPSILON
from megatron_comp.search.sensitivity import attach_probes, measure_window
from megatron_comp.wire import exchange
from megatron_comp.wire.codec import parse_codec

RANKS, K = 2, 3
INT8 = "int8:32:fp16"
DROP = {f"0-{LAYERS - 1}": {"attention": "drop"}}
LONG = torch.randint(128, (3, 60), generator=torch.Generator().manual_seed(1))
WHOLE, PART = 1 << 30, 2000


def tensors(ranks=RANKS, **words):
    return predictors.tensors(LAYERS, HIDDEN, ranks, k=K, **words)


def write(path, made, ranks=RANKS):
    return predictors.write(path, made, ranks)


def mlp_inputs(model):
    """What each layer's MLP sees before its norm."""
    seen = []
    hooks = [
        layer.pre_mlp_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        for layer in model.decoder.layers
    ]
    all_logits(model)
    for hook in hooks:
        hook.remove()
    return seen


def in_ranks(rank, world_size, folder, files):
    init_parallel(world_size)
    model = build_model(folder)
    view = inside_view(model)
    made = {"stock": all_logits(model)}

    def under(**words):
        mc.apply_compression(model, policy(**words))
        return all_logits(model)

    made["none"] = under(codec="none", predictor=files["both"])
    made["gated"] = under(codec=INT8, min_bytes=1 << 30, predictor=files["both"])
    for algorithm in ("gather_sum", "two_step"):
        made[algorithm] = under(codec=INT8, algorithm=algorithm, predictor=files["both"])
        made[algorithm, "tokens"] = generate(model, IDS[0], 4).tokens
    made["attention"] = under(codec=INT8, predictor=files["attention"])
    made["dropped"] = under(codec="none", layers=DROP)
    made["dropped inputs"] = mlp_inputs(model)
    made["dropped, biases"] = under(codec="none", layers=DROP, predictor=files["biases"])
    made["dropped, biases inputs"] = mlp_inputs(model)
    made["dropped, int8"] = under(codec=INT8, layers=DROP, predictor=files["biases"])
    made["response"] = under(codec="none", layers=DROP, predictor=files["response"])
    made["response inputs"] = mlp_inputs(model)
    for size in (WHOLE, PART):
        exchange.OVERLAP_BYTES["cpu"] = size
        for name, words in {"long": {}, "long, dropped": {"layers": DROP}}.items():
            mc.apply_compression(model, policy(codec=INT8, predictor=files["response"], **words))
            made[name, size] = logits(model, LONG, gather=True)
    for name in sorted(REFUSED.keys() - {"training"}):  # all ranks in one order
        made[name] = message_of(mc.apply_compression, model, policy(predictor=files[name]))
    made["differs"] = message_of(mc.apply_compression, model, policy(predictor=files["both" if rank else "attention"]))
    made["training"] = message_of(mc.apply_compression, model, policy(predictor=files["both"]), allow_training=True)
    mc.remove_compression(model)
    assert inside_view(model) == view
    made["removed"] = all_logits(model)
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, both, response = tmp_path_factory.mktemp("predictors"), tensors(), tensors(up=0.0, response=0.1)
    (folder / "text").write_text("not a file of tensors")
    shapes = both | {"layers.1.mlp.down": both["layers.1.mlp.down"][1:].contiguous()}
    return {
        "both": write(folder / "both", both),
        "attention": write(folder / "attention", tensors(sites=["attention"])),
        "biases": write(folder / "biases", tensors(up=0.0)),
        "response": write(folder / "response", response),
        "other ranks": write(folder / "other", tensors(ranks=4), 4),
        "layer": write(folder / "layer", both | {k.replace("s.1.", "s.9."): v.clone() for k, v in both.items()}),
        "shape": write(folder / "shape", shapes),
        "number": write(folder / "number", both | {"layers.2.mlp.down": torch.zeros(())}),
        "missing": write(folder / "lack", {k: v for k, v in both.items() if k != "layers.0.mlp.up"}),
        "name": write(folder / "name", both | {"lm_head.weight": torch.zeros(1)}),
        "text": str(folder / "text"),
        "experts": write(folder / "experts", tensors(sites=["experts"])),
        "response shape": write(folder / "wide", response | {"layers.0.attention.response_up": torch.zeros(3, HIDDEN)}),
        "response of MLP": write(folder / "mlp", both | {"layers.0.mlp.response_bias": torch.zeros(HIDDEN)}),
        "half": write(folder / "half", {k: v for k, v in response.items() if k != "layers.2.attention.response_down"}),
        "no file": str(folder / "absent"),
    }


@pytest.fixture(scope="module")
def ranks(llama, files):
    return run_ranks(in_ranks, RANKS, llama, files)


def test_sums_that_travel_exactly_are_not_predicted(ranks):
    for made in ranks:
        for name in ("none", "gated", "removed"):
            assert torch.equal(made[name], made["stock"]), name


@pytest.mark.parametrize("name", ["gather_sum", "two_step", "attention"])
def test_what_is_predicted_and_what_is_sent_add_up(ranks, name):
    """Whatever is predicted: int8 rounds what is left, of about the size of the sums themselves."""
    for made in ranks:
        assert torch.equal(made[name], ranks[0][name]) and not torch.equal(made[name], made["stock"])
        assert is_near(made[name], made["stock"])


def test_the_prediction_is_taken_off_what_is_sent(llama, tmp_path):
    """With predictions far larger than the sums, what int8 rounds is far larger, too: they do travel less them."""
    far = write(tmp_path / "far", tensors(scale=2.0))
    error, damage = run_ranks(errors, RANKS, llama, far)[0]
    assert error["far"] > 5 * error["plain"]
    assert damage["far"] > 25 * damage["plain"] > 0  # which a search's sensitivities tell of too


def errors(rank, world_size, folder, far):
    init_parallel(world_size)
    model = build_model(folder)
    stock, made, damage = all_logits(model), {}, {}
    for name, file in {"plain": None, "far": far}.items():
        mc.apply_compression(model, policy(codec=INT8, predictor=file))
        made[name] = (all_logits(model) - stock).abs().mean()
        probes = attach_probes(model, (parse_codec(INT8),), predictor=file)
        measure_window(model, IDS[0], 0)
        damage[name] = sum(float(probe.damage[0]) for probe in probes)
    return made, damage


def test_a_dropped_sum_gets_the_other_ranks_predictions(ranks):
    """With biases alone the first layer's MLP sees the other rank's bias more; and the sum at the end is what it was
    with that input."""
    for rank, made in enumerate(ranks):
        other = tensors(up=0.0)["layers.0.attention.bias"][1 - rank]
        before, after = made["dropped inputs"][0], made["dropped, biases inputs"][0]
        torch.testing.assert_close(after, before + other, rtol=0, atol=1e-5)
        assert torch.equal(made["dropped, biases"], ranks[0]["dropped, biases"])
        assert not torch.equal(made["dropped, biases"], made["dropped"])
        assert is_near(made["dropped, int8"], made["dropped, biases"])
        assert not is_near(made["dropped"], made["dropped, biases"])


def test_the_response_is_sent_and_the_ranks_own_mlp_does_not_see_it(ranks):
    for made in ranks:
        assert torch.equal(made["response inputs"][0], made["dropped, biases inputs"][0])
        assert torch.equal(made["response"], ranks[0]["response"])
        assert not is_near(made["response"], made["dropped, biases"])


@pytest.mark.parametrize("name", ["long", "long, dropped"])
def test_parts_give_what_the_whole_gives(ranks, name):
    for made in ranks:
        assert torch.equal(made[name, PART], ranks[0][name, PART])
        torch.testing.assert_close(made[name, PART], made[name, WHOLE], rtol=0, atol=2e-2)


REFUSED = {
    "other ranks": "is for 4 ranks, not for 2",
    "layer": "has layer 9; the model has layers 0 to 3",
    "shape": "layers.1.mlp.down has shape [95, 3], expected [96, 3]",
    "number": "layers.2.mlp.down has shape [], expected [96, 0]",
    "missing": "layers.0.mlp.up is missing",
    "name": "lm_head.weight is not the name of a predictor's tensor",
    "text": "is not a valid safetensors file",
    "experts": "predicts experts of layer 0, which has attention and mlp",
    "response shape": "layers.0.attention.response_up has shape [3, 96], expected [4, 96]",
    "response of MLP": "layers.0.mlp.response_bias is not the name of a predictor's tensor",
    "half": "layers.2.attention.response_down is missing, expected [96, 0]",
    "no file": "No such file",
    "training": "leave out allow_training=True",
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_not_of_this_model(ranks, name):
    for made in ranks:
        assert REFUSED[name] in made[name] and "predictor" in made[name]


def test_ranks_must_predict_alike(ranks):
    for made in ranks:
        assert "differs between tensor-parallel ranks" in made["differs"]


def test_tokens_are_decoded_alike(ranks):
    for name in ("gather_sum", "two_step"):
        assert len({tuple(made[name, "tokens"]) for made in ranks}) == 1


@pytest.mark.parametrize("k", [1, 7, 8, 64])
def test_a_bias_is_one_more_row_and_rows_are_a_multiple_of_eight(k):
    from megatron_comp.layers.predictor import with_bias

    up, bias = torch.randn(RANKS, k, HIDDEN), torch.randn(RANKS, HIDDEN)
    made = with_bias(up, bias)
    assert made.shape[1] % 8 == 0 and k < made.shape[1] <= k + 8
    torch.testing.assert_close(torch.nn.functional.pad(up, (0, 0, 0, made.shape[1] - k)).sum(1) + bias, made.sum(1))


def test_the_input_is_normalized_token_by_token():
    from megatron_comp.layers.predictor_file import normalized

    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    expected = torch.tensor([[3.0, 4.0], [0.0, 0.0]]) / torch.tensor([[12.5 + EPSILON], [1.0]]).sqrt()
    torch.testing.assert_close(normalized(x), expected)
