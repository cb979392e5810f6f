# SPDX-License-Identifier: Apache-2.0
"""Row-parallel linears that multiply rows in parts: the order of things, equal results, and when they do not."""

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from models import policy
from order import Order
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference.model import init_parallel
from megatron_comp.layers.plans import Plans
from megatron_comp.layers.reducer import Phase, Reducer
from megatron_comp.layers.row_parallel import attach
from megatron_comp.wire import exchange
from megatron_comp.wire.calibration import LINKS, Calibration, CodecCost, Link
from megatron_comp.wire.codec import Codec

INPUT, OUTPUT = 144, 96
SETTINGS = {
    "gather_sum": {"codec": "mxfp4", "algorithm": "gather_sum"},
    "two_step": {"codec": "int5:32:fp16:hadamard", "algorithm": "two_step"},
    "pair": {"codec": "mxfp4>mxfp8"},
    # Of the whole partial sum, which each of its parts falls short of.
    "min_bytes": {"codec": "mxfp4", "min_bytes": 150 * 2 * OUTPUT * 4},
}


def reducer(phase=None, words=None, **kwargs):
    return Reducer(words or policy(), 3, "mlp", parallel_state.get_tensor_model_parallel_group(), phase, **kwargs)


def linear(ranks, reducer=None, sequence_parallel=False, **kwargs):
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=OUTPUT,
        num_attention_heads=6,
        tensor_model_parallel_size=ranks,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
    )
    options = {"bias": True, "input_is_parallel": True, "skip_bias_add": True} | kwargs
    init = torch.nn.init.normal_
    made = mc.CompressedRowParallelLinear(INPUT, OUTPUT, config=config, init_method=init, **options).eval()
    with torch.no_grad():
        made.bias.normal_()
    if reducer is not None:
        attach(made, reducer)
    return made


def its_input(rank, ranks, rows=150):
    torch.manual_seed(rank + 1)
    return torch.randn(rows, 2, INPUT // ranks)


def run(module, x, bytes_of_a_part):
    """(output, bias, order of things)"""
    exchange.OVERLAP_BYTES["cpu"] = bytes_of_a_part
    with Order() as things:
        output, bias = module(x)
    return output, bias, things.order


@torch.no_grad()
def in_parts_and_whole(rank, ranks):
    init_parallel(ranks)
    x, made = its_input(rank, ranks), {}
    for name, words in SETTINGS.items():
        results = []
        for bytes_of_a_part in (4000, 1 << 30):
            ours = reducer(words=policy(**words), timing=True)
            results.append((*run(linear(ranks, ours), x, bytes_of_a_part), ours.meter.stats))
        made[name] = results
    sizes = [(linear(ranks, reducer(), input_is_parallel=False), n) for n in (4000, 1 << 30)]
    made["input"] = [(*run(whole, x.repeat(1, 1, ranks), size), None) for whole, size in sizes]
    return made


@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_give_what_the_whole_gives(ranks):
    results = run_ranks(in_parts_and_whole, ranks)
    for made in results:
        for name, (parts, whole) in made.items():
            exchanges = 2 if name in ("two_step", "pair") else 1
            assert whole[2] == "m" + "x" * exchanges, name
            count = parts[2].count("m")
            assert count >= 3, name
            # Each part is on its way before the next is computed, and in a second exchange before the one after that.
            assert parts[2] == "mx" + ("mx" + "x" * (exchanges - 1)) * (count - 1) + "x" * (exchanges - 1), name
            assert parts[0].shape == (150, 2, OUTPUT) and torch.equal(parts[1], whole[1]), name
            # Rows are multiplied alike in parts and as a whole by this machine's BLAS; another may round otherwise,
            # and a value on an edge then falls to its neighbour in the codec.
            torch.testing.assert_close(parts[0], whole[0], rtol=0, atol=0 if name == "pair" else 2.0)
            assert torch.equal(parts[0], results[0][name][0][0]), name
            if parts[3]:
                assert parts[3].compressed.seconds > 0
                parts[3].compressed.seconds = whole[3].compressed.seconds
                assert parts[3] == whole[3] and parts[3].compressed.calls == 1, name


class Quantized(mc.CompressedRowParallelLinear):
    """As ModelOpt makes classes: a forward of its own around the stock one."""

    __module__ = "modelopt.torch.quantization.plugins.megatron"

    def forward(self, input_):
        return super().forward(input_)


def not_in_parts(rank, ranks):
    """Name -> order of things in a linear that may not, or need not, compute parts."""
    init_parallel(ranks)
    x = its_input(rank, ranks)

    def order(phase=None, rows=150, words=None, cls=None, **kwargs):
        made = linear(ranks, reducer(phase=phase, words=words), **kwargs)
        made.__class__ = cls or type(made)
        return run(made, x[:rows], 1)[2]

    with torch.no_grad():
        made = {
            "few rows": order(rows=15),
            "one row": order(rows=1),
            "min_bytes": order(words=policy(min_bytes=1 << 20)),
            "none": order(words=policy(codec="none")),
            "decode": order(Phase("decode"), words=policy(phases={"decode": "none"})),
            "scatter": order(sequence_parallel=True),
            "quantized": order(cls=Quantized),
            "detached": order(),
        }
        with torch.autocast("cpu", torch.bfloat16):
            made["autocast"] = order()
    with torch.enable_grad():
        made["gradients"] = order()
    return made


def test_when_the_whole_is_computed_at_once():
    for made in run_ranks(not_in_parts, 2):
        assert made.pop("detached").startswith("mxmx")
        kept = {name: made.pop(name) for name in ("min_bytes", "none", "decode")}
        assert set(kept.values()) == {"ma"}
        assert set(made.values()) == {"mx"}, made


@torch.no_grad()
def by_figures(rank, ranks):
    """Order of things with a link that parts hide work on, and with one that hides nothing."""
    init_parallel(ranks)
    x, orders = its_input(rank, ranks), []
    for hidden in (1.0, 0.0):
        cost = {str(Codec.parse("mxfp4")): CodecCost(1e-6, 1e-9, 1e-6, 1e-9)}
        known = Calibration(dict.fromkeys(LINKS, Link(1e7, 1e-4)), cost, measured={"ranks": 2}, hidden=hidden)
        words = policy(codec="mxfp4")
        orders.append(run(linear(ranks, reducer(words=words, plans=Plans(words, known))), x, 4000)[2])
    return orders


def test_parts_are_computed_where_they_are_predicted_to_hide_something():
    for hiding, not_hiding in run_ranks(by_figures, 2):
        assert hiding == "mx" * 3 and not_hiding == "mx"


@torch.no_grad()
def policies(rank, ranks):
    """A policy that compresses nothing, with a part size that would make parts: Megatron's own bits."""
    init_parallel(ranks)
    exchange.OVERLAP_BYTES["cpu"] = 1
    x, ours = its_input(rank, ranks), linear(ranks, reducer(words=policy(codec="none")))
    stock = linear(ranks)
    stock.__class__ = RowParallelLinear
    return ours(x)[0], stock(x)[0]


def test_without_compression_the_bits_are_megatrons():
    for ours, stock in run_ranks(policies, 2):
        assert torch.equal(ours, stock)
