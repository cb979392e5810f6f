# SPDX-License-Identifier: Apache-2.0
"""Which kernels `apply_compression` has compiled on a GPU: all that the policy can ask for, and no others."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

import megatron_comp as mc
from megatron_comp.layers import warm_up
from megatron_comp.wire.topology import Islands, Topology

CUDA = torch.device("cuda", 1)


@dataclass(frozen=True)
class Group:
    ranks: int

    def size(self):
        return self.ranks


def place(site, ranks, sequence_parallel=False):
    config = SimpleNamespace(hidden_size=96, sequence_parallel=sequence_parallel)
    return SimpleNamespace(layer=0, site=site, module=SimpleNamespace(config=config), group=Group(ranks))


def compiled(monkeypatch, places, device=CUDA, topologies=(), by_level=False, **policy):
    """{(first, second, ranks, algorithm)} of the flat sums, or with ranks and shares of the machine of all others.

    All with the model's type, hidden size and device.
    """
    calls = []
    monkeypatch.setattr(warm_up, "warm_up", lambda *arguments: calls.append(arguments))
    weight = SimpleNamespace(is_cuda=device.type == "cuda", dtype=torch.bfloat16, device=device)
    model = SimpleNamespace(parameters=lambda: iter([weight]))
    warm_up.compile_kernels(model, places, mc.CompressionPolicy(**policy), dict(topologies))
    assert all((kind.dtype, kind.hidden, on) == (torch.bfloat16, 96, CUDA) for kind, on in calls)
    assert len(calls) == len(set(calls))
    kinds = [kind for kind, _ in calls if ((kind.mates, kind.shares) != (1, 1)) == by_level]
    names = [(str(kind.first), str(kind.second), kind.ranks, kind.algorithm, kind.mates, kind.shares) for kind in kinds]
    return {name if by_level else name[:4] for name in names}


MXFP4, MXFP8 = "fp4_e2m1:32:e8m0", "fp8_e4m3:32:e8m0"


@pytest.mark.parametrize(
    "policy, expected",
    [
        ({"codec": "mxfp4"}, {(MXFP4, MXFP4, 4, "gather_sum"), (MXFP4, MXFP4, 4, "two_step")}),
        ({"codec": "mxfp4", "algorithm": "two_step"}, {(MXFP4, MXFP4, 4, "two_step")}),
        ({"codec": "mxfp4>mxfp8"}, {(MXFP4, MXFP8, 4, "two_step")}),
        (
            {"codec": "none", "sites": {"mlp": "mxfp4"}, "phases": {"decode": "mxfp8"}, "algorithm": "gather_sum"},
            {(MXFP4, MXFP4, 4, "gather_sum"), (MXFP8, MXFP8, 4, "gather_sum")},
        ),
        ({"codec": "none"}, set()),
    ],
)
def test_kernels_of_a_policy(monkeypatch, policy, expected):
    places = [place("attention", 4), place("mlp", 4), place("mlp", 4)]
    assert compiled(monkeypatch, places, **policy) == expected


def test_sequence_parallel(monkeypatch):
    assert compiled(monkeypatch, [place("mlp", 2, True)], codec="mxfp4") == {(MXFP4, MXFP4, 2, "reduce_scatter")}


@pytest.mark.parametrize(
    "codec, scatters, expected",
    [
        ("mxfp4", False, (MXFP4, MXFP4, 2, "gather_sum", 3, 2)),
        ("mxfp4>mxfp8", False, (MXFP4, MXFP8, 2, "two_step", 3, 2)),
        ("mxfp4", True, (MXFP4, MXFP4, 2, "reduce_scatter", 3, 2)),
    ],
)
def test_sums_by_level(monkeypatch, codec, scatters, expected):
    """On the larger of two machines: flat sums of all ranks, and sums of three ranks' partial sums between two."""
    islands = Islands.of_names("aabbb")
    topologies = {Group(5): Topology(islands, island=1, place=0, inside=None, across=None)}
    how = {"topologies": topologies, "codec": codec, "algorithm": "hierarchical", "by_level": True}
    assert compiled(monkeypatch, [place("mlp", 5, scatters)], **how) == {expected}


def test_nothing_to_compile(monkeypatch):
    """On a CPU, and where one rank has all there is to sum."""
    assert not compiled(monkeypatch, [place("mlp", 4)], device=torch.device("cpu"), codec="mxfp4")
    assert not compiled(monkeypatch, [place("mlp", 1)], codec="mxfp4")
