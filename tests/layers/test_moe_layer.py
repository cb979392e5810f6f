# SPDX-License-Identifier: Apache-2.0
"""One layer of experts: the very sum that its token dispatcher makes, and everything that travels."""

import math
from unittest.mock import patch

import oracles
import pytest
import torch
from experts import HIDDEN, SETUPS, cases, start, summing_ranks, tokens_stay
from models import policy
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_comp as mc
from megatron_comp.inference.model import build_model
from megatron_comp.layers import reducer
from megatron_comp.wire.codec import parse_codec
from megatron_comp.wire.collectives import run


class Sent(TorchDispatchMode):
    """What goes to torch.distributed: (collective, type, bytes of its output)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            first = next(x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor))
            self.calls.append((function.overloadpacket.__name__, first.dtype, first.nbytes))
        return function(*args, **(kwargs or {}))


def one_layer(rank, world_size, tp, ep, folder):
    """(dispatcher, scattered) -> output, collectives and encoded tensors of the second layer's experts."""
    made = {}
    with start(tp, ep):
        for dispatcher, scattered in cases(tp):
            model = build_model(folder, token_dispatcher=dispatcher, sequence_parallel=scattered)
            layer = model.decoder.layers[1].mlp
            torch.manual_seed(rank // tp)  # the ranks of a tensor-parallel group have the same tokens
            x = torch.randn(12 if scattered else 11, 2, HIDDEN)
            if scattered:
                x = x.chunk(tp)[rank % tp].contiguous()
            got = made[dispatcher, scattered] = {}
            for name, words in {
                "stock": None,
                "none": {"codec": "none"},
                "mxfp4": {"algorithm": "gather_sum"},
                "two_step": {"algorithm": "two_step"},
                "kept": {"min_bytes": 10**9},
                "decode": {"phases": {"prefill": "none"}},
                **({"pair": {"codec": "mxfp4>mxfp8"}} if tokens_stay(ep, scattered) else {}),
            }.items():
                mc.remove_compression(model)
                if words is not None:
                    mc.apply_compression(model, policy(**words))
                encoded = []

                def noted(plan, partial, *args, encoded=encoded):
                    slices = plan.chunks[0].slices if plan.algorithm == "reduce_scatter" else [len(partial)]
                    encoded.extend(partial.clone().split(slices))
                    return run(plan, partial, *args)

                sent = Sent()
                with patch.object(reducer, "run", noted), sent:
                    output, bias = layer(x)
                assert bias is None and output.dtype == x.dtype and output.shape == x.shape
                stats = [site for site in mc.stats(model).sites if (site.layer, site.site) == (1, "experts")]
                got[name] = output, sent.calls, encoded, stats
            splits = getattr(layer.token_dispatcher, "output_splits_tp", None)
            got["splits"] = None if splits is None else splits.tolist()
    return made


@pytest.fixture(scope="module", params=[s for s in SETUPS if s != (1, 1)], ids=lambda setup: "tp{}-ep{}".format(*setup))
def layers(request, mixtrals):
    tp, ep = request.param
    return tp, ep, run_ranks(one_layer, tp * ep, tp, ep, mixtrals[4].folder)


def group_of(rank, tp, ep, dispatcher):
    """Ranks that sum together with this one."""
    return (
        range(tp * ep)
        if summing_ranks(tp, ep, dispatcher) == tp * ep
        else range(rank - rank % tp, rank - rank % tp + tp)
    )


def test_the_partial_sums_add_up_to_the_stock_output(layers):
    """What is encoded on the ranks of a group makes up what stock Megatron returns."""
    tp, ep, ranks = layers
    for rank, made in enumerate(ranks):
        for (dispatcher, scattered), got in made.items():
            if dispatcher == "alltoall" and not tokens_stay(ep, scattered):
                continue  # copies of tokens, which the dispatcher weighs and adds later
            group = group_of(rank, tp, ep, dispatcher)
            partials = [torch.cat(ranks[other][dispatcher, scattered]["mxfp4"][2]) for other in group]
            total = sum(partials).view(-1, HIDDEN)
            if not tokens_stay(ep, scattered):
                total = total.chunk(len(group))[group.index(rank)]
            torch.testing.assert_close(total, got["stock"][0].view(-1, HIDDEN), atol=1e-4, rtol=0)


def test_the_output_is_the_sum_of_decoded_messages(layers):
    """To the bit, in rank order, also a rank's own share."""
    tp, ep, ranks = layers
    codec = parse_codec("mxfp4")
    for rank, made in enumerate(ranks):
        for (dispatcher, scattered), got in made.items():
            group = group_of(rank, tp, ep, dispatcher)
            if dispatcher == "alltoall" and not tokens_stay(ep, scattered) or len(group) == 1:
                continue
            total = 0
            for other in group:
                encoded = ranks[other][dispatcher, scattered]["mxfp4"][2]
                part = encoded[0 if tokens_stay(ep, scattered) else group.index(rank)]
                total = total + codec.decode(codec.encode(part), part.shape, torch.float32)
            assert torch.equal(got["mxfp4"][0], total.view_as(got["mxfp4"][0]))
            assert not torch.equal(got["mxfp4"][0], got["stock"][0])


def test_ranks_of_a_group_return_the_same_bits(layers):
    tp, ep, ranks = layers
    for rank, made in enumerate(ranks):
        for (dispatcher, scattered), got in made.items():
            if not scattered:
                first = ranks[rank - rank % tp][dispatcher, scattered]
                for name in ("mxfp4", "two_step", "pair"):
                    assert name not in got or torch.equal(got[name][0], first[name][0])


def test_codecs_err_by_their_size(layers):
    """Also where copies of tokens are summed, which no test above follows to the bit."""
    _, _, ranks = layers
    for made in ranks:
        for case, got in made.items():
            for name in ("mxfp4", "two_step", "pair"):
                if name in got and got["mxfp4"][3]:
                    error = (got[name][0] - got["stock"][0]).norm() / got["stock"][0].norm()
                    assert 0.02 < error < 0.25, (case, name)


NAMES = {"gather_sum": ["_allgather_base_"], "two_step": ["alltoall_base_", "_allgather_base_"]}


def test_kept_by_policy_is_what_stock_megatron_does(layers):
    tp, ep, ranks = layers
    for made in ranks:
        for case, got in made.items():
            assert torch.equal(got["none"][0], got["stock"][0]) and got["none"][1] == got["stock"][1], case
            assert len(got["none"][3]) == (summing_ranks(tp, ep, case[0]) > 1) and got["stock"][3] == []


def test_tokens_stay_where_they_are(layers):
    """One all-reduce of the tokens per layer, where the stock dispatchers gather a copy of them from every rank."""
    tp, ep, ranks = layers
    for made in ranks:
        for (dispatcher, scattered), got in made.items():
            if not tokens_stay(ep, scattered):
                continue
            rows = 22
            for name, algorithm in (("mxfp4", "gather_sum"), ("two_step", "two_step"), ("pair", "two_step")):
                calls = got[name][1]
                assert [call[0] for call in calls] == NAMES[algorithm], (dispatcher, name)
                assert {call[1] for call in calls} == {torch.uint8}
            message = oracles.message_bytes("fp4_e2m1:32:e8m0", (rows, HIDDEN))
            assert got["mxfp4"][1] == [("_allgather_base_", torch.uint8, tp * message)]
            assert got["kept"][1] == got["decode"][1] == [("allreduce_", torch.float32, rows * HIDDEN * 4)]
            floats = [nbytes for _, dtype, nbytes in got["stock"][1] if dtype == torch.float32]
            assert sum(floats) > 2 * rows * HIDDEN * 4 and len(got["stock"][1]) > 3
            if dispatcher == "allgather":
                assert ("_allgather_base_", torch.float32, tp * rows * HIDDEN * 4) in got["stock"][1]


def test_scattered_sums_take_the_place_of_the_stock_reduce_scatter(layers):
    """All else that a dispatcher sends stays as it was."""
    tp, ep, ranks = layers
    for made in ranks:
        for (dispatcher, scattered), got in made.items():
            if tokens_stay(ep, scattered) or not got["mxfp4"][3]:
                continue
            stock, ours = got["stock"][1], got["mxfp4"][1]
            coded = [call for call in ours if call[1] == torch.uint8 and call[0] == "alltoall_base_"]
            assert len(coded) == 1 and got["kept"][1] == got["decode"][1] == stock
            # The routing map, of booleans, travels as bytes too.
            if dispatcher == "allgather":
                place = ours.index(coded[0])
                assert ours[:place] + ours[place + 1 :] == [c for c in stock if c[0] != "_reduce_scatter_base_"]
                assert len(ours) == len(stock)
            assert torch.equal(got["kept"][0], got["stock"][0]) and torch.equal(got["decode"][0], got["stock"][0])


def test_counted_bytes_are_those_sent(layers):
    tp, ep, ranks = layers
    for made in ranks:
        for (dispatcher, scattered), got in made.items():
            peers, rows = summing_ranks(tp, ep, dispatcher), 22
            for name in ("mxfp4", "two_step"):
                if not got[name][3]:
                    assert peers == 1
                    continue
                (site,) = got[name][3]
                calls = [call for call in got[name][1] if call[1] == torch.uint8]
                if tokens_stay(ep, scattered) and name == "two_step":
                    calls = calls[:1]  # the second phase counts messages, and sends slots: see the collectives' tests
                    own = math.ceil(rows / tp)
                    second = (peers - 1) * oracles.message_bytes("fp4_e2m1:32:e8m0", (own, HIDDEN))
                else:
                    calls, second = [call for call in calls if call[2] and call[0] != "_allgather_base_"] or calls, 0
                received = sum(nbytes for *_, nbytes in calls) * (peers - 1) // peers
                assert site.compressed.received_bytes == received + second
                assert site.kept.calls == 0


def test_kept_sums_say_why(layers):
    tp, ep, ranks = layers
    for made in ranks:
        for (dispatcher, scattered), got in made.items():
            for name, reason in (("kept", "min_bytes"), ("decode", "policy")):
                for site in got[name][3]:
                    assert site.kept_because == {reason: 1} and site.compressed.calls == 0
                    assert site.kept.message_bytes == site.kept.values * 4 > 0
                    passes, peers = (2 if tokens_stay(ep, scattered) else 1), summing_ranks(tp, ep, dispatcher)
                    assert site.kept.received_bytes == passes * (peers - 1) * site.kept.message_bytes // peers
            assert torch.allclose(got["kept"][0], got["stock"][0], atol=1e-4)


def test_uneven_numbers_of_tokens_were_among_them(layers):
    tp, ep, ranks = layers
    if (tp, ep) == (2, 2):
        splits = [made["alltoall", True]["splits"] for made in ranks]
        assert any(len(set(each)) > 1 for each in splits), splits
