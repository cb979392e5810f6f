# SPDX-License-Identifier: Apache-2.0
"""`torch.compile(fullgraph=True)` of compressed linears: the eager bits; the phase counts when compiled code runs."""

import pytest
import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from models import policy
from ranks import run_ranks

from megatron_comp.inference.model import init_parallel
from megatron_comp.layers.reducer import Phase, Reducer
from megatron_comp.layers.row_parallel import attach
from megatron_comp.wire.native import compiler

BACKENDS = ["eager", "aot_eager"] + (["inductor"] if compiler() else [])
SUMS = {
    "gather_sum": {"algorithm": "gather_sum"},
    "two_step": {"codec": "int4:32:fp16:hadamard", "algorithm": "two_step"},
    "uncompressed": {"codec": "none"},
    "scattered": {},
    "scattered, uncompressed": {"codec": "none"},
}


@torch.no_grad()
def compiled(rank, world_size, backend):
    """name -> (eager output, compiled output, stats of one eager and of one compiled call); calls by phase."""
    init_parallel(world_size)
    made, words = {}, {"num_layers": 1, "hidden_size": 96, "num_attention_heads": 6}
    words |= {"tensor_model_parallel_size": world_size, "use_cpu_initialization": True}
    torch.manual_seed(rank)
    x = torch.randn(6, 2, 144 // world_size)
    for name, of_policy in SUMS.items():
        config = TransformerConfig(sequence_parallel=name.startswith("scattered"), **words)
        options = {"bias": False, "input_is_parallel": True, "skip_bias_add": True}
        linear = RowParallelLinear(144, 96, config=config, init_method=torch.nn.init.normal_, **options)
        linear.eval().requires_grad_(False)
        phase = Phase()
        reducer = Reducer(policy(**of_policy, phases={"decode": "mxfp8"}), 0, "mlp", linear.tp_group, phase)
        attach(linear, reducer)
        torch._dynamo.reset()
        faster = torch.compile(linear, fullgraph=True, backend=backend)
        faster(x)
        reducer.meter.stats.compressed.calls = reducer.meter.stats.kept.calls = 0
        made[name] = [linear(x)[0], faster(x)[0]]
        phase.name = "decode"  # no new code is compiled for it
        made[name] += [linear(x)[0], faster(x)[0], reducer.meter.stats]
    return made


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_linears_sum_as_eager_ones_do(backend):
    ranks = run_ranks(compiled, 2, backend)
    for made in ranks:
        for name, (eager, faster, eager_decode, faster_decode, stats) in made.items():
            assert eager.shape == (3 if name.startswith("scattered") else 6, 2, 96)
            # A compiler may order a product's additions in its own way, and a value on an edge rounds to its neighbour.
            close = {"rtol": 0, "atol": 2.0} if backend == "inductor" else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(faster, eager, **close)
            torch.testing.assert_close(faster_decode, eager_decode, **close)
            kept = name.endswith("uncompressed")
            assert torch.equal(eager, eager_decode) == kept
            assert (stats.compressed.calls, stats.kept.calls) == ((0, 4) if kept else (4, 0))
            if not name.startswith("scattered"):
                assert torch.equal(faster, ranks[0][name][1])


def in_training(rank, world_size):
    init_parallel(world_size)
    words = {"num_layers": 1, "hidden_size": 96, "num_attention_heads": 6, "use_cpu_initialization": True}
    config = TransformerConfig(tensor_model_parallel_size=world_size, **words)
    options = {"bias": False, "input_is_parallel": True, "skip_bias_add": True}
    linear = RowParallelLinear(144, 96, config=config, init_method=torch.nn.init.normal_, **options)
    attach(linear.requires_grad_(False), Reducer(policy(), 0, "mlp", linear.tp_group))
    x = torch.randn(4, 1, 144 // world_size, requires_grad=True)
    try:
        torch.compile(linear, fullgraph=True, backend="eager")(x)
    except Exception as error:
        return str(error)
    return "no error"


def test_training_is_refused():
    for said in run_ranks(in_training, 2):
        assert "a compressed reduction in training mode" in said
