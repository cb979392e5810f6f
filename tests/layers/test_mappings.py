# SPDX-License-Identifier: Apache-2.0
"""Both mappings against Megatron's own: gradients equal theirs, values are those of the compressed collectives."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from ranks import run_ranks

import megatron_comp as mc
from megatron_comp.inference import cpu
from megatron_comp.layers.mappings import (
    compressed_reduce_from_tensor_model_parallel_region,
    compressed_reduce_scatter_to_sequence_parallel_region,
)
from megatron_comp.wire.codec import parse_codec

RANKS = 3
CODECS = {"gather_sum": "mxfp4", "two_step": "int4:32:fp16", "pair": "int4:32:fp16>int8:32:fp16"}


def gradient(x, upstream, mapping, *args, **kwargs):
    """(output, gradient of x) of a mapping whose output gets the gradient `upstream`."""
    x = x.clone().requires_grad_()
    # Times one, since a linear's partial sum is no leaf, and stock Megatron reduces it in place.
    output = mapping(x * 1, *args, **kwargs)
    output.backward(upstream)
    return output.detach().clone(), x.grad


def both(rank, world_size):
    """name -> (ours, Megatron's, the compressed collective's) of every mapping."""
    cpu.prepare()
    torch.manual_seed(rank)  # every rank has its own partial sum and its own upstream gradient
    world = dist.group.WORLD
    x, upstream = torch.randn(2 * world_size, 2, 96), torch.randn(2 * world_size, 2, 96)
    made = {}
    for name, text in CODECS.items():
        codec, algorithm = parse_codec(text), "auto" if name == "pair" else name
        made[name] = (
            gradient(x, upstream, compressed_reduce_from_tensor_model_parallel_region, codec, world, algorithm),
            gradient(x, upstream, reduce_from_tensor_model_parallel_region, group=world),
            mc.all_reduce(x, text, algorithm=algorithm),
        )
    part = upstream[:2].contiguous()
    made["scatter"] = (
        gradient(x, part, compressed_reduce_scatter_to_sequence_parallel_region, parse_codec("mxfp4"), world),
        gradient(x, part, reduce_scatter_to_sequence_parallel_region, group=world),
        mc.all_reduce(x, "mxfp4", algorithm="gather_sum").chunk(world_size)[rank],
    )
    return made, upstream, strided_and_grouped(rank, x)


def strided_and_grouped(rank, x):
    """A strided input, and a group that is not the world, by its first and its last rank."""
    codec, group = parse_codec("mxfp8"), dist.new_group([0, 2])
    strided = x.transpose(0, 1)
    pairs = [
        (
            compressed_reduce_from_tensor_model_parallel_region(strided, codec, dist.group.WORLD, "gather_sum"),
            mc.all_reduce(strided.contiguous(), "mxfp8", algorithm="gather_sum"),
        )
    ]
    if rank != 1:
        mine, upstream = x[:4].clone().requires_grad_(), torch.full((2, 2, 96), float(rank))
        part = compressed_reduce_scatter_to_sequence_parallel_region(mine, codec, group)
        part.backward(upstream)
        whole = mc.all_reduce(x[:4], "mxfp8", group, "gather_sum")
        pairs.append((part.detach(), whole.chunk(2)[rank // 2]))
        pairs.append((compressed_reduce_from_tensor_model_parallel_region(x[:4], codec, group, "gather_sum"), whole))
        pairs.append((mine.grad, torch.cat([torch.zeros(2, 2, 96), torch.full((2, 2, 96), 2.0)])))
    return pairs


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(both, RANKS)


@pytest.mark.parametrize("name", [*CODECS, "scatter"])
def test_gradient_is_megatrons(ranks, name):
    for made, _, _ in ranks:
        (_, ours), (_, megatrons), _ = made[name]
        assert torch.equal(ours, megatrons)
        assert ours.abs().sum() > 0


def test_gradients_are_identity_and_all_gather(ranks):
    gathered = torch.cat([upstream[:2] for _, upstream, _ in ranks])
    for made, upstream, _ in ranks:
        assert torch.equal(made["gather_sum"][0][1], upstream)
        assert torch.equal(made["scatter"][0][1], gathered)


@pytest.mark.parametrize("name", [*CODECS, "scatter"])
def test_values_are_the_compressed_collectives(ranks, name):
    for made, _, _ in ranks:
        (ours, _), (stock, _), collective = made[name]
        assert torch.equal(ours, collective)
        assert not torch.equal(ours, stock)  # something was rounded
        torch.testing.assert_close(ours, stock, atol=2.0, rtol=0)


@pytest.mark.parametrize("name", CODECS)
def test_all_ranks_have_the_same_bits(ranks, name):
    first = ranks[0][0][name][0][0]
    assert all(torch.equal(made[name][0][0], first) for made, _, _ in ranks[1:])


def test_strided_input_and_sub_groups(ranks):
    for rank, (_, _, pairs) in enumerate(ranks):
        assert len(pairs) == (1 if rank == 1 else 4)
        assert all(torch.equal(got, expected) for got, expected in pairs)
