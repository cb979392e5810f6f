# SPDX-License-Identifier: Apache-2.0
"""How many Python calls in this package one reduction of a built model's linear takes."""

import sys
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from models import policy
from ranks import run_ranks

import megatron_comp
from megatron_comp.inference.model import init_parallel
from megatron_comp.layers.reducer import Reducer
from megatron_comp.layers.row_parallel import attach

PACKAGE = str(Path(megatron_comp.__file__).parent)
# name -> (policy, rows, at most so many calls)
SUMS = {
    "decode": ({"algorithm": "gather_sum"}, 1, 25),
    "two_step": ({"codec": "int4:32:fp16:hadamard", "algorithm": "two_step"}, 16, 40),
    "uncompressed": ({"codec": "none"}, 1, 6),
}


@torch.no_grad()
def calls(rank, world_size):
    """name -> the calls of functions in this package, as `file:function`, of a sum whose plan is known."""
    init_parallel(world_size)
    words = {"num_layers": 1, "hidden_size": 96, "num_attention_heads": 6, "tensor_model_parallel_size": world_size}
    config, made = TransformerConfig(use_cpu_initialization=True, **words), {}
    for name, (words, rows, _) in SUMS.items():
        options = {"bias": False, "input_is_parallel": True, "skip_bias_add": True}
        linear = RowParallelLinear(144, 96, config=config, init_method=torch.nn.init.normal_, **options).eval()
        attach(linear, Reducer(policy(**words), 0, "mlp", linear.tp_group))
        x, called = torch.randn(rows, 1, 144 // world_size), []

        def note(frame, event, _argument, called=called):
            if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
                called.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")

        linear(x)
        sys.setprofile(note)
        linear(x)
        sys.setprofile(None)
        made[name] = called
    return made


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(calls, 2)


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_takes_few_calls(ranks, name):
    for made in ranks:
        assert 0 < len(made[name]) <= SUMS[name][2], made[name]
        assert "reducer.py:__call__" in made[name]
