# SPDX-License-Identifier: Apache-2.0
"""The seam for Transformer Engine's linears, on stand-ins: Transformer Engine needs a GPU.

A stand-in has what the seam touches, computes as the local linear that it replaces, and raises if its own reduction is
ever asked for.
"""

import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from megatron.core.tensor_parallel import reduce_scatter_to_sequence_parallel_region
from models import all_logits, message_of, policy
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference.model import RMSNorm, build_model, init_parallel
from megatron_comp.layers import transformer_engine

RANKS = 2


class StandIn(torch.nn.Module):
    """As TERowParallelLinear: reduces in parallel mode "row", and leaves the partial sum without a mode."""

    def __init__(self, local):
        super().__init__()
        self.weight, self.config, self._tp_group = local.weight, local.config, local.tp_group
        self.sequence_parallel, self.parallel_mode = local.sequence_parallel, "row"
        self.use_bias, self.te_return_bias = False, False

    def forward(self, x):
        assert self.parallel_mode is None, "the linear's own reduction was asked for"
        return torch.matmul(x, self.weight.t()), None


class InferenceStandIn(StandIn):
    """As InferenceRowParallelLinear: one method multiplies and reduces; in training mode Transformer Engine does."""

    own_sums = 0

    def _matmul_reduce_scatter(self, x, residual=None):
        self.own_sums += 1
        return reduce_scatter_to_sequence_parallel_region(x @ self.weight.t(), group=self._tp_group)

    def forward(self, x):
        return super().forward(x) if self.training else (self._matmul_reduce_scatter(x), None)


class TERowParallelLinearLayerNorm(StandIn):
    """As Megatron-Bridge's of that name: a norm of the sum."""

    def __init__(self, local):
        super().__init__(local)
        self.post_layernorm = RMSNorm(local.config, local.output_size)

    def forward(self, x):
        output, bias = super().forward(x)
        return self.post_layernorm(output), bias


class QuantStandIn(StandIn):
    """As ModelOpt makes classes: a forward of its own around the stock one."""

    __module__ = "modelopt.torch.quantization.plugins.megatron"

    def forward(self, x):
        return super().forward(x)


CLASSES = (StandIn, InferenceStandIn)


def stand_in(model, cls):
    for layer in model.decoder.layers:
        layer.self_attention.linear_proj = cls(layer.self_attention.linear_proj)
        layer.mlp.linear_fc2 = cls(layer.mlp.linear_fc2)
    return model.eval()


def compressed(rank, world_size, folder, cls, sequence_parallel):
    """What stand-ins give, compressed, and what the local linears do."""
    init_parallel(world_size)
    local = mc.apply_compression(build_model(folder, sequence_parallel=sequence_parallel), policy())
    with patch.object(transformer_engine, "stock_classes", lambda: CLASSES):
        model = stand_in(build_model(folder, sequence_parallel=sequence_parallel), globals()[cls])
        before = [type(module) for module in model.modules()]
        mc.apply_compression(model, policy())
        found, stats = all_logits(model), mc.stats(model)
        mc.remove_compression(model)
        restored = [type(module) for module in model.modules()] == before
        modes = {linear.parallel_mode for linear in model.modules() if isinstance(linear, StandIn)}
    return found, all_logits(local), stats.compressed.calls, stats.received_bytes, mc.stats(local), restored, modes


@pytest.mark.parametrize(
    "cls, sequence_parallel",
    [
        ("StandIn", False),
        ("StandIn", True),
        ("QuantStandIn", False),
        ("QuantStandIn", True),
        ("InferenceStandIn", True),
    ],
)
def test_sums_are_those_of_the_local_linears(llama, cls, sequence_parallel):
    for found, expected, calls, received, local, restored, modes in run_ranks(
        compressed, RANKS, llama, cls, sequence_parallel
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert calls == local.compressed.calls == 8
        assert received == local.received_bytes
        assert restored and modes == {"row"}


@torch.no_grad()
def with_a_norm(rank, world_size, folder, sequence_parallel):
    """Of a linear with a norm behind its sum: what it gives, and the norm of the compressed sum; what drop says."""
    init_parallel(world_size)
    with patch.object(transformer_engine, "stock_classes", lambda: CLASSES):
        model = build_model(folder, sequence_parallel=sequence_parallel)
        stand_in(model, TERowParallelLinearLayerNorm)
        mc.apply_compression(model, policy(codec="int8:32:fp16"))
        linear = model.decoder.layers[1].mlp.linear_fc2
        torch.manual_seed(rank)
        x = torch.randn(4, 1, linear.weight.shape[1])
        total = mc.all_reduce(x @ linear.weight.t(), "int8:32:fp16", algorithm="gather_sum")
        expected = linear.post_layernorm.forward(total.chunk(world_size)[rank] if sequence_parallel else total)
        output, calls = linear(x)[0], mc.stats(model).compressed.calls
        said = message_of(mc.apply_compression, model, policy(layers={1: {"attention": "drop"}}))
        hooks = len(linear.post_layernorm._forward_pre_hooks)
        mc.remove_compression(model)
    return output, expected, calls, said, hooks - len(linear.post_layernorm._forward_pre_hooks)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_norm_is_of_the_sum(llama, sequence_parallel):
    for output, expected, calls, said, hooks in run_ranks(with_a_norm, RANKS, llama, sequence_parallel):
        assert torch.equal(output, expected) and calls == 1
        assert "attention cannot be dropped" in said and ("norm" in said or "sequence_parallel" in said)
        assert hooks == 1


class Quantized:
    """Stands for MXFP8Tensor, which is no parameter and has no transpose."""

    def __init__(self, weight):
        self.weight = weight

    def size(self, dim):
        return self.weight.size(dim)


def inference_linears(rank, world_size, folder):
    """(own sums, compressed and kept sums, bits equal) by phase; with converted weights; what training said."""
    init_parallel(world_size)
    made = {}
    with patch.object(transformer_engine, "stock_classes", lambda: CLASSES):
        model = stand_in(build_model(folder, sequence_parallel=True), InferenceStandIn)
        stock = all_logits(model)
        linears = [linear for linear in model.modules() if isinstance(linear, InferenceStandIn)]
        mc.apply_compression(model, policy(min_bytes=10**9))
        for linear in linears:
            linear.own_sums = 0
        kept = all_logits(model)
        made["kept"] = torch.equal(kept, stock), sum(linear.own_sums for linear in linears), mc.stats(model)

        compressed = all_logits(mc.apply_compression(model, policy()))
        weights = [linear.weight for linear in linears]
        for linear in linears:
            del linear.weight
            linear.weight = Quantized(weights.pop(0))
        with patch.object(transformer_engine, "_product", lambda linear, x: x @ linear.weight.weight.t()):
            made["converted"] = torch.equal(all_logits(model), compressed)
            mc.apply_compression(model, policy())  # also if weights were converted before
            made["converted before"] = torch.equal(all_logits(model), compressed)
        linear = linears[0].train()
        linear.weight = torch.nn.Parameter(linear.weight.weight)
        x = torch.randn(4, 1, linear.weight.shape[1])
        try:
            linear(x)
        except RuntimeError as error:
            made["training"] = str(error)
        with torch.no_grad():
            made["rows"] = len(linear(x)[0])
    return made


def test_inference_linears(llama):
    for made in run_ranks(inference_linears, RANKS, llama):
        same, own_sums, stats = made["kept"]
        assert same and own_sums == 8 and stats.kept_because == {"min_bytes": 8}
        assert made["converted"] and made["converted before"]
        assert "layer 0 attention: a compressed reduction in training mode" in made["training"]
        assert made["rows"] == 4 // RANKS


FLAGS = {
    "tp_comm_overlap": (True, "set tp_comm_overlap=False"),
    "symmetric_ar_type": ("two_shot", "set symmetric_ar_type=None"),
    "inference_fuse_tp_communication": (True, "set inference_fuse_tp_communication=False"),
}


def refusals(rank, world_size, folder):
    init_parallel(world_size)
    said = {}
    with patch.object(transformer_engine, "stock_classes", lambda: CLASSES):
        model = stand_in(build_model(folder), StandIn)
        linear = model.decoder.layers[1].mlp.linear_fc2
        for flag, (value, _) in FLAGS.items():
            with patch.object(linear.config, flag, value, create=True):
                said[flag] = message_of(mc.apply_compression, model, policy())
        linear.use_bias = True
        said["bias"] = message_of(mc.apply_compression, model, policy())
        linear.use_bias = False
        linear.__class__ = type("TheirLinear", (StandIn,), {"forward": lambda self, x: StandIn.forward(self, x)})
        said["class"] = message_of(mc.apply_compression, model, policy())
        linear.__class__ = StandIn
        said["none"] = message_of(mc.apply_compression, model, mc.CompressionPolicy())
        said["untouched"] = {type(each) for each in model.modules() if isinstance(each, StandIn)} == {StandIn}
    return said


@pytest.fixture(scope="module")
def said(llama):
    return run_ranks(refusals, RANKS, llama)


@pytest.mark.parametrize("flag", FLAGS)
def test_a_reduction_elsewhere_is_refused_by_its_flag(said, flag):
    for of_rank in said:
        assert of_rank[flag].endswith(FLAGS[flag][1]), of_rank[flag]


def test_what_cannot_be_taken_apart_is_refused(said):
    for of_rank in said:
        assert "adds its bias itself" in of_rank["bias"]
        assert "TheirLinear is a linear of Transformer Engine's that cannot be compressed" in of_rank["class"]


def test_a_policy_of_none_leaves_them_alone(said):
    for of_rank in said:
        assert of_rank["none"] == "no error" and of_rank["untouched"]


class TEFusedMLP(torch.nn.Module):
    """Stands for the class of that name, which use_te_op_fuser brings."""


def fused(rank, world_size, folder):
    init_parallel(world_size)
    model = build_model(folder)
    model.decoder.layers[0].fused = TEFusedMLP()
    return message_of(mc.apply_compression, model, policy())


def test_the_op_fuser_is_refused(llama):
    (message,) = run_ranks(fused, 1, llama)
    assert message.startswith("use_te_op_fuser=True") and message.endswith("set it to False to compress")


def test_without_transformer_engine_there_is_nothing():
    assert transformer_engine.stock_classes() == ()


@pytest.mark.parametrize("missing", range(2))
def test_one_missing_class_hides_no_other(missing):
    homes = ["megatron.core.extensions.transformer_engine", "megatron.core.tensor_parallel.inference_layers"]
    there = SimpleNamespace(TERowParallelLinear=StandIn, InferenceRowParallelLinear=InferenceStandIn)
    with patch.dict(sys.modules, {home: None if number == missing else there for number, home in enumerate(homes)}):
        assert transformer_engine.stock_classes.__wrapped__() == (CLASSES[1 - missing],)
