"""The seam for Transformer Engine's linears, on stand-ins: Transformer Engine needs a GPU.

A stand-in has what the seam touches, computes as the local linear that it replaces, and raises if its own reduction is
ever asked for.
"""

from unittest.mock import patch

import pytest
import torch
from models import all_logits, message_of, policy
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference.model import build_model, init_parallel
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
    """As InferenceRowParallelLinear: one method multiplies and reduces."""

    def __init__(self, local):
        super().__init__(local)
        self.tp_group = local.tp_group

    def _matmul_reduce_scatter(self, x, residual=None):
        raise AssertionError("the linear's own reduction was asked for")

    def forward(self, x):
        return self._matmul_reduce_scatter(x), None


CLASSES = {
    StandIn: transformer_engine._CompressedTELinear,
    InferenceStandIn: transformer_engine._CompressedInferenceLinear,
}


def stand_in(model, cls):
    for layer in model.decoder.layers:
        layer.self_attention.linear_proj = cls(layer.self_attention.linear_proj)
        layer.mlp.linear_fc2 = cls(layer.mlp.linear_fc2)
    return model


def compressed(rank, world_size, folder, cls, sequence_parallel):
    """What stand-ins give, compressed, and what the local linears do."""
    init_parallel(world_size)
    local = mc.apply_compression(build_model(folder, sequence_parallel=sequence_parallel), policy())
    with patch.object(transformer_engine, "stock_classes", lambda: CLASSES):
        model = stand_in(build_model(folder, sequence_parallel=sequence_parallel), cls)
        before = [type(module) for module in model.modules()]
        mc.apply_compression(model, policy())
        found, stats = all_logits(model), mc.stats(model)
        mc.remove_compression(model)
        restored = [type(module) for module in model.modules()] == before
        modes = {linear.parallel_mode for linear in model.modules() if isinstance(linear, StandIn)}
    return found, all_logits(local), stats.compressed.calls, stats.received_bytes, mc.stats(local), restored, modes


@pytest.mark.parametrize("cls, sequence_parallel", [(StandIn, False), (StandIn, True), (InferenceStandIn, True)])
def test_sums_are_those_of_the_local_linears(llama, cls, sequence_parallel):
    for found, expected, calls, received, local, restored, modes in run_ranks(
        compressed, RANKS, llama, cls, sequence_parallel
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert calls == local.compressed.calls == 8
        assert received == local.received_bytes
        assert restored and modes == {"row"}


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
        linear.__class__ = type("TheirLinear", (StandIn,), {})
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
    assert transformer_engine.stock_classes() == {}
