"""Mixture-of-experts layers against stock Megatron: what their token dispatchers sum, how they send it, what stays.

Tokens stay: without sequence and expert parallelism every rank holds all tokens, and one all-reduce sums up.
Otherwise every rank gets the sums of its own tokens: a reduce-scatter.
"""

import copy
import math
import warnings
from contextlib import contextmanager
from dataclasses import fields
from unittest.mock import patch

import oracles
import pytest
import torch
import torch.distributed as dist
from megatron.core import model_parallel_config, parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from models import EXPERT_IDS, experts_model, inside_view, policy, whole_logits
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_comp as mc
from megatron_comp.inference import cpu
from megatron_comp.inference.generate import generate, logits
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.wire.codec import Codec, parse_codec

LAYERS, HIDDEN = 3, 96  # of the fixture `mixtrals`
INT8 = "int8:32:fp32"
DISPATCHERS = ("allgather", "alltoall")
SETUPS = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2)]  # tensor-parallel x expert-parallel ranks


def cases(tp):
    return [
        (dispatcher, scattered) for dispatcher in DISPATCHERS for scattered in ((False, True) if tp > 1 else (False,))
    ]


def tokens_stay(ep, sequence_parallel):
    return ep == 1 and not sequence_parallel


def summing_ranks(tp, ep, dispatcher):
    """All-to-all adds up only what the ranks of one expert hold; gathered tokens meet all experts at once."""
    return tp * ep if dispatcher == "allgather" else tp


# Collectives over lists of tensors of different sizes, which stock Megatron needs and gloo has not.


def all_gather(outputs, x, group=None):
    for source, output in zip(dist.get_process_group_ranks(group), outputs, strict=True):
        if source == dist.get_rank():
            output.copy_(x)
        if output.numel():
            dist.broadcast(output, source, group=group)


def reduce_scatter(output, inputs, group=None):
    for target, part in zip(dist.get_process_group_ranks(group), inputs, strict=True):
        total = part.clone()
        if total.numel():
            dist.all_reduce(total, group=group)
        if target == dist.get_rank():
            output.copy_(total)


@contextmanager
def uneven_collectives():
    with patch.object(dist, "all_gather", all_gather), patch.object(dist, "reduce_scatter", reduce_scatter):
        yield


def start(tp, ep):
    """Megatron's groups, and what its dispatchers need on gloo."""
    model_parallel_config.warnings = warnings  # Megatron-Core 0.15 names it without importing it
    init_parallel(tp, expert_parallel=ep)
    cpu.prepare_streams()
    return uneven_collectives()


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


# Whole models: off, on, with another policy, off again.


def there_and_back(model, ref):
    layers = [layer.mlp for layer in model.decoder.layers]
    dispatchers = [layer.token_dispatcher for layer in layers]
    before = inside_view(model)

    def with_stock_dispatchers():
        return all(layer.token_dispatcher is dispatcher for layer, dispatcher in zip(layers, dispatchers))

    def forward():
        return logits(model, ref.ids, gather=True)

    made = {"stock": forward()}
    for name, words in {
        "none": {"codec": "none"},
        "experts kept": {"sites": {"experts": "none"}},
        "int8": {"codec": INT8, "algorithm": "gather_sum"},
        "mxfp4": {"algorithm": "two_step"},
        "int8 again": {"codec": INT8, "algorithm": "gather_sum"},
    }.items():
        mc.apply_compression(model, policy(**words))
        made[name], made[f"{name} stats"] = forward(), copy.deepcopy(mc.stats(model))
        made[f"{name} stock"] = with_stock_dispatchers()
        assert torch.equal(forward(), made[name])  # nothing is left over from a forward
    for _ in range(2):
        mc.remove_compression(model)
        assert inside_view(model) == before
    made["removed"], made["removed stock"] = forward(), with_stock_dispatchers()
    return made


def whole_models(rank, world_size, tp, ep, ref):
    made = {}
    with start(tp, ep):
        for dispatcher, scattered in cases(tp):
            model = build_model(ref.folder, token_dispatcher=dispatcher, sequence_parallel=scattered)
            made[dispatcher, scattered] = there_and_back(model, ref)
    return made


@pytest.fixture(scope="module", params=SETUPS, ids=lambda setup: "tp{}-ep{}".format(*setup))
def models(request, mixtrals):
    """(TP, EP, what each rank made of each case)."""
    tp, ep = request.param
    return tp, ep, run_ranks(whole_models, tp * ep, tp, ep, mixtrals[4 * ep])


def test_stock_logits_are_hugging_faces(models, mixtrals):
    _, ep, ranks = models
    for made in ranks:
        for case, got in made.items():
            torch.testing.assert_close(got["stock"], mixtrals[4 * ep].logits, atol=1e-4, rtol=0, msg=str(case))


def test_off_is_bit_equal_and_the_same_dispatcher(models):
    for made in models[2]:
        for case, got in made.items():
            for name in ("none", "removed"):
                assert torch.equal(got[name], got["stock"]), case
            assert got["none stock"] and got["experts kept stock"] and got["removed stock"], case
            sites = {site.site for site in got["experts kept stats"].sites}
            assert sites == {"attention"}, case


def test_int8_is_close_and_every_rank_has_the_same_bits(models):
    tp, ep, ranks = models
    for case in ranks[0]:
        for rank, made in enumerate(ranks):
            got, first = made[case], ranks[rank - rank % tp][case]
            assert torch.equal(got["int8"], first["int8"]) and torch.equal(got["mxfp4"], first["mxfp4"]), case
            assert torch.equal(got["int8 again"], got["int8"]), case
            # Of most values: a token that rounding sends to other experts changes much, and what attends to it some.
            error = (got["int8"] - got["stock"]).abs().median() / got["stock"].std()
            coarse = (got["mxfp4"] - got["stock"]).abs().median() / got["stock"].std()
            if summing_ranks(tp, ep, case[0]) > 1:
                assert 1e-5 < error < 0.04 and 5 * error < coarse < 0.5, case
            else:
                assert error == coarse == 0, case


def test_every_layer_counts_its_experts(models, mixtrals):
    """Calls, values and bytes of one forward, from the cost formulas where the number of rows is known beforehand."""
    tp, ep, ranks = models
    for rank, made in enumerate(ranks):
        for (dispatcher, scattered), got in made.items():
            peers, stay = summing_ranks(tp, ep, dispatcher), tokens_stay(ep, scattered)
            for name, codec in (("int8", INT8), ("mxfp4", "fp4_e2m1:32:e8m0"), ("int8 again", INT8)):
                sites = [site for site in got[f"{name} stats"].sites if site.site == "experts"]
                assert [site.layer for site in sites] == (list(range(LAYERS)) if peers > 1 else [])
                for site in sites:
                    assert site.kept.calls == 0 and site.compressed.calls == 1
                    algorithm = "two_step" if name == "mxfp4" else "gather_sum"
                    assert site.algorithms == {algorithm if stay else "reduce_scatter": 1}
                    if stay or dispatcher == "allgather":
                        batch, length = mixtrals[4 * ep].ids.shape
                        own = batch * (-(-length // tp) if scattered else length)
                        rows = own if stay else own * peers
                        assert site.compressed.values == rows * HIDDEN
                        assert site.compressed.message_bytes == oracles.message_bytes(codec, (rows, HIDDEN))
                        if not stay:
                            received = oracles.message_bytes(codec, (own, HIDDEN))
                        elif name == "mxfp4":
                            parts = [rows // tp + (r < rows % tp) for r in range(tp)]
                            received = sum(oracles.message_bytes(codec, (parts[r], HIDDEN)) for r in (rank % tp, 0))
                        else:
                            received = site.compressed.message_bytes
                        assert site.compressed.received_bytes == (peers - 1) * received


def test_all_to_all_sums_every_copy_of_every_token_once(models, mixtrals):
    """With expert parallelism the ranks that share experts sum the tokens that came to these: together two copies."""
    tp, ep, ranks = models
    batch, length = mixtrals[4 * ep].ids.shape
    for dispatcher, scattered in ranks[0]:
        if dispatcher == "alltoall" and tp > 1 and not tokens_stay(ep, scattered):
            tokens = ep * batch * (-(-length // tp) * tp if scattered else length * tp)
            for layer in range(LAYERS):
                sites = [_experts(made[dispatcher, scattered]["int8 stats"])[layer] for made in ranks[::tp]]
                assert sum(site.compressed.values for site in sites) == 2 * tokens * HIDDEN


def _experts(stats):
    return [site for site in stats.sites if site.site == "experts"]


# One layer: the very sum, and everything that travels.


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
                "stock": {"codec": "none"},
                "mxfp4": {"algorithm": "gather_sum"},
                "two_step": {"algorithm": "two_step"},
                "kept": {"min_bytes": 10**9},
                "decode": {"phases": {"prefill": "none"}},
                **({"pair": {"codec": "mxfp4>mxfp8"}} if tokens_stay(ep, scattered) else {}),
            }.items():
                mc.apply_compression(model, policy(**words))
                encoded, encode = [], Codec.encode

                def noted(codec, part, encode=encode, encoded=encoded):
                    encoded.append(part.clone())
                    return encode(codec, part)

                sent = Sent()
                with patch.object(Codec, "encode", noted), sent:
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


def test_tokens_stay_where_they_are(layers):
    """One all-reduce of the tokens a layer, where the stock dispatchers gather a copy of them from every rank."""
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


# Where ranks hold other tokens than their tensor-parallel neighbours, or nothing at all.


@torch.no_grad()
def expert_tensor_parallel(rank, world_size, tp, expert_tp):
    """dispatcher -> (stock, compressed, stats) of a layer whose experts are split otherwise than attention."""
    cpu.prepare()
    cpu.prepare_streams()
    parallel_state.initialize_model_parallel(tp, expert_tensor_parallel_size=expert_tp)
    model_parallel_cuda_manual_seed(1, inference_rng_tracker=True, force_reset_rng=True)
    made = {}
    with uneven_collectives():
        for dispatcher in DISPATCHERS:
            model = experts_model(moe_token_dispatcher_type=dispatcher)
            torch.manual_seed(rank // tp)
            x, layer = torch.randn(5, 2, 64), model.decoder.layers[0].mlp
            stock, _ = layer(x)
            mc.apply_compression(model, policy(codec=INT8))
            made[dispatcher] = stock, layer(x)[0], _experts(mc.stats(model))
    return made


@pytest.mark.parametrize("tp, expert_tp", [(1, 2), (2, 1), (4, 2)], ids=["1-over-2", "2-over-1", "4-over-2"])
def test_experts_split_otherwise_than_attention(tp, expert_tp):
    """Over more ranks, some of these hold another data-parallel rank's tokens."""
    for made in run_ranks(expert_tensor_parallel, max(tp, expert_tp), tp, expert_tp):
        for stock, ours, sites in made.values():
            torch.testing.assert_close(ours, stock, atol=0.02 * stock.std().item(), rtol=0)
            assert torch.equal(ours, stock) == (expert_tp == 1)
            assert [site.compressed.calls for site in sites] == ([1, 0] if expert_tp > 1 else [])


@torch.no_grad()
def few_tokens(rank, world_size, folder):
    """One token a rank, which may all go to the experts of other ranks: (stock, compressed, splits), many times."""
    made = []
    with start(2, 2):
        model = build_model(folder, token_dispatcher="alltoall", sequence_parallel=True)
        layer = model.decoder.layers[0].mlp
        for seed in range(6):
            torch.manual_seed(10 * seed + rank)
            x = torch.randn(1, 1, HIDDEN)
            mc.remove_compression(model)
            stock, _ = layer(x)
            mc.apply_compression(model, policy(codec=INT8))
            ours, _ = layer(x)
            (site, *_) = _experts(mc.stats(model))
            made.append((stock, ours, layer.token_dispatcher.output_splits_tp.tolist(), site.compressed))
    return made


def test_ranks_without_a_token_for_their_experts(mixtrals):
    ranks = run_ranks(few_tokens, 4, mixtrals[4].folder)
    for rank, made in enumerate(ranks):
        for stock, ours, splits, traffic in made:
            torch.testing.assert_close(ours, stock, atol=0.03 * stock.std().item(), rtol=0)
            assert (traffic.values, traffic.calls) == (sum(splits) * HIDDEN, 1)
            assert traffic.received_bytes == oracles.message_bytes(INT8, (splits[rank % 2], HIDDEN))
    assert any(0 in splits and sum(splits) for made in ranks for *_, splits, _ in made)


@torch.no_grad()
def half_precision(rank, world_size, folder):
    """Hidden states in bf16, the router's probabilities in fp32: (types of what is encoded, stock, ours, stats)."""
    made = {}
    with start(world_size, 1):
        for case in cases(world_size):
            dispatcher, scattered = case
            model = build_model(folder, dtype=torch.bfloat16, token_dispatcher=dispatcher, sequence_parallel=scattered)
            layer = model.decoder.layers[0].mlp
            torch.manual_seed(rank if scattered else 0)
            x = torch.randn(4, 2, HIDDEN).bfloat16()
            stock, _ = layer(x)
            types, encode = set(), Codec.encode

            def noted(codec, part, encode=encode, types=types):
                types.add(part.dtype)
                return encode(codec, part)

            mc.apply_compression(model, policy(codec=INT8))
            with patch.object(Codec, "encode", noted):
                ours, _ = layer(x)
            mc.apply_compression(model, policy(min_bytes=10**9))
            kept, _ = layer(x)
            made[case] = types, stock, ours, kept, _experts(mc.stats(model))[0].kept
    return made


def test_sums_are_taken_in_the_type_of_the_routers_probabilities(mixtrals):
    for made in run_ranks(half_precision, 2, mixtrals[4].folder):
        for types, stock, ours, kept, traffic in made.values():
            assert types == {torch.float32}
            assert stock.dtype == ours.dtype == kept.dtype == torch.bfloat16
            # Eight significant bits of bf16, and a little more than that of int8.
            torch.testing.assert_close(ours.float(), stock.float(), atol=0.03 * stock.std().item(), rtol=2**-7)
            torch.testing.assert_close(kept.float(), stock.float(), atol=0.01 * stock.std().item(), rtol=2**-7)
            assert traffic.message_bytes == traffic.values * 4 and traffic.values % (8 * HIDDEN) == 0


# Shared experts.

SHARED = {"moe_shared_expert_intermediate_size": 32}
OVERLAP = SHARED | {"moe_shared_expert_overlap": True, "moe_token_dispatcher_type": "alltoall"}
GATED = {"moe_shared_expert_gate": True}
HAS_GATE = "moe_shared_expert_gate" in {field.name for field in fields(TransformerConfig)}
SHARING = {
    "allgather": SHARED,
    "alltoall": SHARED | {"moe_token_dispatcher_type": "alltoall"},
    "overlap": OVERLAP,
    **({"gate": SHARED | GATED, "overlap-gate": OVERLAP | GATED} if HAS_GATE else {}),
}
KEPT = {"experts": {"sites": {"experts": "none"}}, "shared_experts": {"sites": {"shared_experts": "none"}}}


def shared(rank, world_size, tp, ep):
    """(sharing, scattered) -> logits and stats by policy."""
    made = {}
    with start(tp, ep):
        for name, options in SHARING.items():
            for scattered in (False, True):
                model = experts_model(sequence_parallel=scattered, **options)
                with torch.no_grad():
                    for layer in model.decoder.layers:  # as large as the others' part, so that a mistake shows
                        layer.mlp.shared_experts.linear_fc2.weight.mul_(20)
                before = inside_view(model)
                got = made[name, scattered] = {"stock": whole_logits(model)}
                for policy_name, words in {
                    "all": {"codec": INT8},
                    "none": {"codec": "none"},
                    "experts": {"codec": INT8, "sites": {"shared_experts": "none", "attention": "none"}},
                    "shared_experts": {"codec": INT8, "sites": {"experts": "none", "attention": "none"}},
                    "mxfp4": {"sites": {"experts": "none", "attention": "none"}},
                    "kept": {"min_bytes": 10**9},
                }.items():
                    mc.apply_compression(model, policy(**words))
                    got[policy_name] = whole_logits(model)
                    got[f"{policy_name} stats"] = mc.stats(model).sites
                mc.remove_compression(model)
                assert inside_view(model) == before
                got["removed"] = whole_logits(model)
    return made


@pytest.fixture(scope="module", params=[(2, 1), (2, 2)], ids=["tp2-ep1", "tp2-ep2"])
def sharing(request):
    return run_ranks(shared, math.prod(request.param), *request.param)


@pytest.mark.parametrize("scattered", [False, True], ids=["plain", "sequence_parallel"])
@pytest.mark.parametrize("name", SHARING)
def test_shared_experts(sharing, name, scattered):
    for rank, made in enumerate(sharing):
        got, first = made[name, scattered], sharing[rank - rank % 2][name, scattered]
        stock = got["stock"]
        assert torch.equal(got["none"], stock) and torch.equal(got["removed"], stock)
        torch.testing.assert_close(got["kept"], stock, atol=1e-5, rtol=0)
        for policy_name, sites in {
            "all": {"attention", "experts", "shared_experts"},
            "experts": {"experts"},
            "shared_experts": {"shared_experts"},
            "mxfp4": {"shared_experts"},
        }.items():
            assert torch.equal(got[policy_name], first[policy_name])
            assert not torch.equal(got[policy_name], stock)
            done = [(site.layer, site.site) for site in got[f"{policy_name} stats"] if site.compressed.calls == 1]
            assert sorted(done) == [(layer, site) for layer in (0, 1) for site in sorted(sites)]
            error = (got[policy_name] - stock).abs().mean() / stock.std()
            assert error < (0.4 if policy_name == "mxfp4" else 0.02), policy_name
        assert (got["shared_experts"] - stock).abs().mean() < (got["mxfp4"] - stock).abs().mean() / 4
        kept = [site for site in got["kept stats"] if site.kept_because == {"min_bytes": 1}]
        assert sorted((site.layer, site.site) for site in kept) == [
            (layer, site) for layer in (0, 1) for site in ("attention", "experts", "shared_experts")
        ]


def test_shared_experts_send_their_own_tokens_only(sharing):
    """Bytes of one sum of shared experts: those of the ranks' tokens, whatever the experts do."""
    rows, hidden = EXPERT_IDS.numel(), 64
    for made in sharing:
        for (_, scattered), got in made.items():
            for site in got["shared_experts stats"]:
                if site.site == "shared_experts":
                    assert site.compressed.values == rows * hidden
                    assert site.compressed.message_bytes == oracles.message_bytes(INT8, (rows, hidden))
                    received = oracles.message_bytes(INT8, (rows // 2 if scattered else rows, hidden))
                    assert site.compressed.received_bytes == received


# Gradients.


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


# Policies.

EVERY = {(layer, site) for layer in range(LAYERS) for site in ("attention", "experts")}
REACHES = {
    "all": ({}, EVERY),
    "experts kept": ({"sites": {"experts": "none"}}, {p for p in EVERY if p[1] == "attention"}),
    "only experts": ({"codec": "none", "sites": {"experts": "mxfp8"}}, {p for p in EVERY if p[1] == "experts"}),
    "a layer": ({"codec": "none", "layers": {1: "mxfp8"}}, {(1, "attention"), (1, "experts")}),
    "experts of a layer": ({"codec": "none", "layers": {2: {"experts": "mxfp8"}}}, {(2, "experts")}),
    "but for a layer's": ({"layers": {"0-1": {"experts": "none"}}}, EVERY - {(0, "experts"), (1, "experts")}),
}
PROMPT, NEW = list(range(1, 14)), 4


def reached(rank, world_size, ref):
    """(what each policy compressed, a layer's own codec, stats of generation by phase) for each dispatcher."""
    made = {}
    with start(world_size, 1):
        for dispatcher in DISPATCHERS:
            model = build_model(ref.folder, token_dispatcher=dispatcher)
            got = made[dispatcher] = {}
            for name, (words, _) in REACHES.items():
                mc.apply_compression(model, policy(**words))
                logits(model, ref.ids)
                got[name] = mc.stats(model).sites
            mc.apply_compression(model, policy(layers={1: {"experts": INT8}}))
            logits(model, ref.ids)
            got["own codec"] = [site.compressed.message_bytes for site in _experts(mc.stats(model))]
            for name, words in {
                "prefill": {"phases": {"decode": "none"}},
                "decode": {"phases": {"prefill": "none"}},
                "large": {"min_bytes": len(PROMPT) * HIDDEN * 4},
            }.items():
                mc.apply_compression(model, policy(**words))
                generate(model, PROMPT, NEW)
                got[name] = _experts(mc.stats(model))
    return made


@pytest.fixture(scope="module")
def reaches(mixtrals):
    return run_ranks(reached, 2, mixtrals[4])


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("name", REACHES)
def test_a_policy_reaches_the_experts_it_names(reaches, name, dispatcher):
    for made in reaches:
        sites = made[dispatcher][name]
        assert {(site.layer, site.site) for site in sites if site.compressed.calls == 1} == REACHES[name][1]
        assert not any(site.compressed.calls for site in sites if (site.layer, site.site) not in REACHES[name][1])


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_a_layers_experts_have_their_own_codec(reaches, dispatcher):
    for made in reaches:
        mxfp4, int8 = (oracles.message_bytes(codec, (22, HIDDEN)) for codec in ("fp4_e2m1:32:e8m0", INT8))
        assert made[dispatcher]["own codec"] == [mxfp4, int8, mxfp4]


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize(
    "name, compressed, kept",
    [("prefill", 1, {"policy": NEW - 1}), ("decode", NEW - 1, {"policy": 1}), ("large", 1, {"min_bytes": NEW - 1})],
)
def test_phases_and_small_messages(reaches, name, compressed, kept, dispatcher):
    for made in reaches:
        for site in made[dispatcher][name]:
            assert (site.compressed.calls, site.kept_because) == (compressed, kept)
            tokens = len(PROMPT) if name != "decode" else NEW - 1
            assert site.compressed.values == tokens * HIDDEN


@torch.no_grad()
def capacity(rank, world_size):
    """Tokens beyond an expert's capacity are dropped: (stock, compressed) of a dispatcher that pads to it."""
    init_parallel(world_size)
    model = experts_model(
        moe_token_dispatcher_type="alltoall", moe_expert_capacity_factor=0.5, moe_pad_expert_input_to_capacity=True
    )
    stock = whole_logits(model)
    mc.apply_compression(model, policy(codec=INT8))
    return stock, whole_logits(model), whole_logits(mc.apply_compression(model, policy(codec="none")))


def test_experts_with_a_capacity(record_property):
    ranks = run_ranks(capacity, 2)
    for stock, ours, none in ranks:
        assert torch.equal(none, stock) and torch.equal(ours, ranks[0][1])
        assert 0 < (ours - stock).abs().mean() < 0.02 * stock.std()


def one_rank(rank, world_size, ref):
    init_parallel(1)
    made = []
    for dispatcher in DISPATCHERS:
        model = build_model(ref.folder, token_dispatcher=dispatcher)
        dispatchers = [layer.mlp.token_dispatcher for layer in model.decoder.layers]
        stock = logits(model, ref.ids)
        mc.apply_compression(model, policy(sites={"experts": "mxfp8"}))
        same = all(layer.mlp.token_dispatcher is before for layer, before in zip(model.decoder.layers, dispatchers))
        made.append((stock, logits(model, ref.ids), same, _experts(mc.stats(model))))
    return made


def test_one_rank_has_nothing_to_sum(mixtrals):
    for stock, ours, same, experts in run_ranks(one_rank, 1, mixtrals[4])[0]:
        assert torch.equal(stock, ours) and same and experts == []
