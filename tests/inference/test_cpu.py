# SPDX-License-Identifier: Apache-2.0
"""Products with frozen bf16 weights on a machine without CUDA: right for any number of rows, and by one matrix."""

import pytest
import torch
from megatron.core.tensor_parallel import layers
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_comp.inference import cpu
from megatron_comp.inference.model import init_parallel

# Rows of each product.
ROWS = (1, 2, 3, 40)


class Operations(TorchDispatchMode):
    """What is multiplied, and in which type."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "bmm"):
            self.seen.add((function.overloadpacket.__name__, args[0].dtype))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def products(rank, ranks):
    """By rows: (largest error as a share of the largest value, shape, what was multiplied)."""
    init_parallel(ranks)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 96, generator=generator).bfloat16()
    made = {}
    for rows in ROWS:
        # As embeddings leave it: [rows, 1, 96] with strides of [1, rows, 96].
        x = torch.randn(1, rows, 96, generator=generator).bfloat16().transpose(0, 1)
        with Operations() as operations:
            y = layers.linear_with_frozen_weight(x, weight, None, False, False, False, None)
        exact = x.double() @ weight.double().t()
        made[rows] = float((y - exact).abs().max() / exact.abs().max()), tuple(y.shape), y.dtype, operations.seen
    return made


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU multiplies by itself")
def test_products_with_frozen_weights():
    (made,) = run_ranks(products, 1)
    for rows, (error, shape, dtype, seen) in made.items():
        assert error < 2**-7, rows
        assert shape == (rows, 1, 48) and dtype == torch.bfloat16
        if torch.backends.cpu.get_cpu_capability() == "AVX2" and rows > cpu.FEW_ROWS:
            assert seen == {("mm", torch.float32)}, rows
        elif rows <= cpu.FEW_ROWS:
            assert torch.float32 not in {each for _, each in seen}, rows
