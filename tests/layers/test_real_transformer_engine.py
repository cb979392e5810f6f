# SPDX-License-Identifier: Apache-2.0
"""The seam on the real Python of Transformer Engine, two ranks over gloo; only its C++ is replaced (tests/support)."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import commands
import pytest
import real_te
import torch

SUPPORT = Path(real_te.__file__).parent
SUMS = 8  # of the fixture `llama`: two per layer
KINDS = [*product(["TERowParallelLinear"], [False, True], [False, True]), ("InferenceRowParallelLinear", True, False)]
CASES = [(*kind, codec) for kind in KINDS for codec in ("mxfp4", "int8:32:fp16")]


@pytest.fixture(scope="module")
def results(llama, transformer_engine_wheel, tmp_path_factory):
    """By case, what each rank saw."""
    out = tmp_path_factory.mktemp("transformer_engine")
    path = os.pathsep.join([str(SUPPORT), *sys.path])
    command = commands.on_ranks(2, [sys.executable, SUPPORT / "te_ranks.py", transformer_engine_wheel, llama, out])
    ranks = subprocess.run(  # new processes: Megatron looks for Transformer Engine as it is imported
        list(map(str, command)),
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ranks.returncode == 0, ranks.stderr[-5000:]
    return [torch.load(out / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_are_ours(results, case):
    for rank in results:
        seen = rank[case]
        own = "reduce-scatter" if case[1] else "all-reduce"
        # The other one multiplies and reduces by Megatron's own code.
        assert seen["stock"][1] == ([own] * SUMS if case[0] == "TERowParallelLinear" else [])
        assert seen["compressed"][1] == []
        assert seen["calls"] == {"compressed": SUMS, "uncompressed": 0}
        stock, compressed = seen["stock"][0], seen["compressed"][0]
        assert 0 < (compressed - stock).norm() / stock.norm() < 0.5


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_ranks_have_the_same_bits(results, case):
    assert torch.equal(results[0][case]["compressed"][0], results[1][case]["compressed"][0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_uncompressed_and_removed_are_stock(results, case):
    for rank in results:
        seen = rank[case]
        assert torch.equal(seen["small"][0], seen["stock"][0])
        assert seen["small calls"] == SUMS
        assert torch.equal(seen["removed"][0], seen["stock"][0])
        assert seen["removed"][1] == seen["stock"][1]
        assert seen["removed inside"] == seen["stock inside"]


@pytest.mark.parametrize("case", [case for case in CASES if not case[2]], ids=str)
def test_equal_to_local_linears(results, case):
    for rank in results:
        seen = rank[case]
        assert torch.equal(seen["stock"][0], seen["local stock"])
        assert torch.equal(seen["compressed"][0], seen["local compressed"])
        assert seen["received_bytes"] == seen["local received_bytes"]
