# SPDX-License-Identifier: Apache-2.0
"""Quantization by NVIDIA's ModelOpt and compressed sums in one model, whichever of the two comes first."""

import os
import sys
from pathlib import Path

import commands
import pytest
import torch

REPO = Path(__file__).resolve().parents[2]
SUMS = 4  # of examples/stock_gpt.py: two per layer
ORDERS = ["compressed, then quantized", "compressed, then restored", "quantized, then compressed"]


@pytest.fixture(scope="module")
def results(modelopt_packages, tmp_path_factory):
    """What each rank saw."""
    out = tmp_path_factory.mktemp("modelopt")
    environment = {**os.environ, "PYTHONPATH": str(REPO / "examples"), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, REPO / "tests" / "support" / "modelopt_ranks.py", modelopt_packages, out]
    ranks = commands.run(commands.on_ranks(2, script), environment)
    assert ranks.returncode == 0, ranks.stderr[-5000:]
    return [torch.load(out / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("order", ORDERS)
def test_all_quantizers_are_there_and_all_sums_are_ours(results, order):
    for rank in results:
        stock, seen = rank["stock"], rank[order]
        assert seen["quantizers"] == stock["quantizers"]
        assert any("linear_proj" in name for name in seen["quantizers"])
        assert any("linear_fc2" in name for name in seen["quantizers"])
        assert (stock["sums"], seen["sums"]) == (0, SUMS)
        assert torch.equal(seen["logits"], seen["by hand"])
        assert not torch.equal(seen["logits"], stock["logits"])


@pytest.mark.parametrize("order", ORDERS)
def test_all_ranks_have_the_same_bits(results, order):
    assert torch.equal(results[0][order]["logits"], results[1][order]["logits"])


def test_state_is_that_of_the_stock_model(results):
    for rank in results:
        assert rank["missing"] == []
        assert rank["compressed keys"] == rank["keys"]


def test_removed_is_the_quantized_stock_model(results):
    for rank in results:
        assert torch.equal(rank["removed"]["logits"], rank["stock"]["logits"])
        assert rank["removed"]["sums"] == 0
