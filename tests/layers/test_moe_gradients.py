# SPDX-License-Identifier: Apache-2.0
"""Gradients through mixture-of-experts layers: refused in training mode, or as Megatron has them."""

import math

import pytest
import torch
from experts import DISPATCHERS, cases, start, tokens_stay
from models import experts_model, policy
from ranks import run_ranks

import megatron_comp as mc


def gradients(rank, world_size, tp, ep):
    """(dispatcher, scattered) -> (what training said, output and gradients of the stock layer, of the compressed)."""
    made = {}
    with start(tp, ep):
        for dispatcher, scattered in cases(tp):
            model = experts_model(moe_token_dispatcher_type=dispatcher, sequence_parallel=scattered)
            # Without sequence parallelism Megatron itself refuses to train experts; gradients in eval mode it gives.
            model.train(scattered)
            layer = model.decoder.layers[1].mlp
            torch.manual_seed(rank if scattered else rank // tp)
            x, upstream = torch.randn(4, 2, 64), torch.randn(4, 2, 64)

            def backward(layer=layer, x=x, upstream=upstream):
                layer.zero_grad()
                leaf = x.clone().requires_grad_()
                output, _ = layer(leaf)
                output.backward(upstream)
                return output.detach(), {"x": leaf.grad} | {n: p.grad.clone() for n, p in layer.named_parameters()}

            stock = backward()
            mc.apply_compression(model, policy())
            refused = None
            if scattered:
                try:
                    backward()
                except RuntimeError as error:
                    refused = str(error)
            mc.apply_compression(model, policy(), allow_training=True)
            made[dispatcher, scattered] = refused, stock, backward()
    return made


@pytest.fixture(scope="module", params=[(2, 1), (2, 2)], ids=["tp2-ep1", "tp2-ep2"])
def trained(request):
    return request.param[1], run_ranks(gradients, math.prod(request.param), *request.param)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_training_needs_leave(trained, dispatcher):
    for made in trained[1]:
        assert "layer 1 experts: a compressed reduction in training mode" in made[dispatcher, True][0]


@pytest.mark.parametrize("scattered", [False, True], ids=["plain", "sequence_parallel"])
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_gradients_are_megatrons(trained, dispatcher, scattered):
    """Where tokens stay, experts' weights have theirs once: with the stock dispatcher each rank's copy adds its own."""
    ep, ranks = trained
    for made in ranks:
        _, (stock, expected), (ours, got) = made[dispatcher, scattered]
        assert not torch.equal(stock, ours)
        for name, gradient in expected.items():
            copies = 2 if tokens_stay(ep, scattered) and "experts" in name else 1
            torch.testing.assert_close(copies * got[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
        assert expected["x"].abs().sum() > 0 and expected["router.weight"].abs().sum() > 0
