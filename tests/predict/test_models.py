# SPDX-License-Identifier: Apache-2.0
"""Names of models as people write them, and which sizes divide them."""

import pytest

from megatron_comp.predict.models import MODELS, load


@pytest.mark.parametrize(
    "text, name",
    [("llama-3-70b", "llama-3-70b"), ("Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"), ("mixtral-8x22b", "mixtral-8x22b"),
     ("meta-llama/Llama-2-7b-hf", "llama-2-7b"), ("meta-llama/Llama-2-13b-chat-hf", "llama-2-13b"),
     ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"), ("meta-llama/Meta-Llama-3-70B", "llama-3-70b"),
     ("Llama-3.3-70B-Instruct", "llama-3.3-70b"), ("llama3.1:405b", "llama-3.1-405b")],
)  # fmt: skip
def test_names(text, name):
    assert load(text) is MODELS[name]


def test_an_unknown_name_has_near_matches():
    with pytest.raises(ValueError, match=r"did you mean .*llama-3\.1-70b.*\?$"):
        load("Llama-3.1-80B")
    with pytest.raises(ValueError, match="nor one of llama-2-7b, .*8x22b$"):
        load("falcon")


@pytest.mark.parametrize("name, billions", [("llama-3.1-405b", 405.9), ("mixtral-8x22b", 140.6), ("llama-3-8b", 8.03)])
def test_weights(name, billions):
    assert MODELS[name].weights / 1e9 == pytest.approx(billions, rel=0.001)


def test_ranks_divide_heads_and_key_value_heads():
    for ranks in (1, 2, 4, 8, 16, 32, 64):
        MODELS["llama-3-70b"].check_ranks(ranks)
    with pytest.raises(
        ValueError, match=r"--tp 7: .* 64 attention heads, 8 key-value heads .*: 1, 2, 4, 8, 16, 32, 64$"
    ):
        MODELS["llama-3-70b"].check_ranks(7)
    with pytest.raises(ValueError, match="1, 2, 4, 8, 16$"):
        MODELS["mixtral-8x22b"].check_ranks(6)  # 6 divides 48 heads, but neither divides nor is divided by 8
