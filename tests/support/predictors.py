# SPDX-License-Identifier: Apache-2.0
"""Files of random predictors, which predict nothing well: what ranks take off and what they add must cancel."""

import torch
from safetensors.torch import save_file


def tensors(layers, hidden, ranks, *, k=3, scale=0.1, up=1.0, sites=("attention", "mlp"), response=0.0):
    """response: scale of attention's, whose rank is one more; without one for 0."""
    draw = torch.Generator().manual_seed(0)
    made = {}
    for layer in range(layers):
        for site in sites:
            key = f"layers.{layer}.{site}"
            made[f"{key}.down"] = torch.randn(hidden, k, generator=draw) * scale
            made[f"{key}.mean"] = torch.randn(k, generator=draw) * scale * up
            made[f"{key}.up"] = torch.randn(ranks, k, hidden, generator=draw) * scale * up
            made[f"{key}.bias"] = torch.randn(ranks, hidden, generator=draw) * scale
    for layer in range(layers if response else 0):
        made[f"layers.{layer}.attention.response_down"] = torch.randn(hidden, k + 1, generator=draw) * response
        made[f"layers.{layer}.attention.response_up"] = torch.randn(k + 1, hidden, generator=draw) * response
        made[f"layers.{layer}.attention.response_bias"] = torch.randn(hidden, generator=draw) * response
    return made


def write(path, made, ranks):
    save_file(made, path, metadata={"tensor_parallel": str(ranks)})
    return str(path)


def is_near(made, expected):
    """Up to what int8 rounds; a prediction that did not cancel would be twenty times as much."""
    return (made - expected).abs().mean() < 0.03 * expected.std()
