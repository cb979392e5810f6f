# SPDX-License-Identifier: Apache-2.0
"""What compression decides of GPUs, as far as a machine without one can ask: peers, captured graphs, buffers."""

import logging

import pytest
import torch

import megatron_comp as mc
from megatron_comp.layers import agreement
from megatron_comp.layers.reducer import Reducer
from megatron_comp.policy import CompressionPolicy
from megatron_comp.wire import exchange
from megatron_comp.wire.calibration import ASSUMED, ASSUMED_PEERS

LARGE = {"layer": 0, "site": "mlp", "phase": "prefill", "shape": (4096, 8192), "itemsize": 2, "world_size": 8}


def test_nothing_is_compressed_between_peers_that_nobody_measured():
    policy = CompressionPolicy(codec="mxfp4")
    assert policy.decide(**LARGE, calibration=ASSUMED).codec is not None
    decision = policy.decide(**LARGE, calibration=ASSUMED_PEERS)
    assert decision.codec is None and decision.reason == "fast link, not calibrated"
    # Whoever gives a number of bytes has decided.
    assert CompressionPolicy(codec="mxfp4", min_bytes=0).decide(**LARGE, calibration=ASSUMED_PEERS).codec is not None


@pytest.mark.parametrize(
    "seen, ranks, reach, expected", [(8, 8, 7, True), (8, 8, 3, False), (1, 8, 7, False), (8, 2, 1, True)]
)
def test_which_gpus_are_peers(monkeypatch, seen, ranks, reach, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, other: other <= reach)
    assert agreement.reach_one_another(ranks) is expected


@pytest.mark.parametrize("calibration", [ASSUMED, ASSUMED_PEERS])
def test_what_is_assumed_is_said_with_the_command_that_measures(caplog, monkeypatch, calibration):
    monkeypatch.delenv("MEGATRON_COMP_CALIBRATION", raising=False)
    agreement.say_calibration(calibration, CompressionPolicy(codec="mxfp4"), 8)
    (said,) = caplog.records
    assert said.levelno == logging.WARNING
    assert calibration.source in said.getMessage() and "megatron-comp calibrate" in said.getMessage()


def test_captured_graphs_keep_their_sums():
    """Megatron keeps them in a module of the layer; here is one that looks alike."""
    model, manager = torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.Module()
    model[0].cudagraph_manager = manager
    manager.cudagraph_runners = []
    mc.remove_compression(model)
    manager.cudagraph_runners = ["a graph"]
    with pytest.raises(ValueError, match="before the inference engine is built, or call .*delete_cuda_graphs"):
        mc.remove_compression(model)


def test_reductions_in_a_capture_are_told_apart(monkeypatch):
    """Their replays run no Python, so that counts lack them: `captured` says so. Nothing waits for the device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pytest.fail("a synchronization in a capture"))
    reducer = Reducer(CompressionPolicy(codec="none"), 0, "mlp", Alone(), timing=True)

    choice = reducer.choose((2, 4), torch.zeros(2, 4))
    with reducer.meter.clock(reducer.meter.record(choice, on_gpu=True)):
        pass
    stats = reducer.meter.stats
    assert (stats.kept.calls, stats.captured, stats.kept.seconds) == (1, 1, None)
    assert mc.ModelStats([stats, stats]).captured == 2


class Alone:
    """A group of one."""

    def size(self):
        return 1


def test_one_chunk_and_one_piece_where_nothing_was_measured():
    assert exchange.chunk_bytes("cuda") is None and exchange.overlap_bytes("cuda") is None
    assert exchange.chunk_bytes("cpu") and exchange.overlap_bytes("cpu")
