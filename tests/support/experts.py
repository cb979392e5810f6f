# SPDX-License-Identifier: Apache-2.0
"""What the tests of mixture-of-experts layers share: setups, what stock dispatchers need on gloo, what is counted.

Tokens stay: without sequence and expert parallelism every rank holds all tokens, and one all-reduce sums up.
Otherwise every rank gets the sums of its own tokens: a reduce-scatter.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch.distributed as dist

from megatron_comp.inference import cpu
from megatron_comp.inference.model import init_parallel

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
    init_parallel(tp, expert_parallel=ep)
    cpu.prepare_streams()
    return uneven_collectives()


def of_experts(stats):
    return [site for site in stats.sites if site.site == "experts"]
