# SPDX-License-Identifier: Apache-2.0
"""Compressed sums as one process computes them, in plain fp32 additions, and a record of what ranks really exchange."""

import hashlib
import math
from collections import Counter

import oracles
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_comp.wire.codec import CodecPair, parse_codec


def tensor(number, rank, shape, dtype):
    return oracles.random_tensor(shape, dtype, seed=1000 * number + rank)


def digest(x):
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


# The same sums in one process.


def rank_order_sum(messages, codec, shape, transformed=False):
    """Separate fp32 additions, rank 0 first; transformed back once, or left `transformed`."""
    rows, hidden = math.prod(shape[:-1]), shape[-1]
    total = oracles.decoded_sum(torch.stack(messages), str(codec), rows, hidden, transformed)
    return torch.from_numpy(total).view(shape)


def expected_gather_sum(tensors, codec):
    x = tensors[0]
    return rank_order_sum([codec.encode(each) for each in tensors], codec, x.shape).to(x.dtype)


def expected_two_step(tensors, codec):
    x, ranks = tensors[0], len(tensors)
    first, second = (codec.first, codec.second) if isinstance(codec, CodecPair) else (codec, codec)
    rows, hidden = math.prod(x.shape[:-1]), x.shape[-1]
    parts, start = [], 0
    for owner in range(ranks):
        count = rows // ranks + (owner < rows % ranks)
        if count:
            slices = [each.reshape(rows, hidden)[start : start + count] for each in tensors]
            messages = [first.encode(each) for each in slices]
            # Where both codecs transform blocks of one size, the second one takes over what is transformed already.
            stays = first.format.hadamard and second.format.hadamard and first.format.block == second.format.block
            total = rank_order_sum(messages, first, (count, hidden), stays)
            plain = parse_codec(str(second).replace(":hadamard", "")) if stays else second
            message = plain.encode(total)
            parts.append(rank_order_sum([message], second, (count, hidden)).to(x.dtype))
        start += count
    return torch.cat(parts).view(x.shape)


def expected_reduce_scatter(tensors, codec, rank):
    size = tensors[0].shape[0] // len(tensors)
    return expected_gather_sum([each[rank * size : (rank + 1) * size] for each in tensors], codec)


def island_sums(tensors, islands):
    """The fp32 sum of each island's tensors, from its first rank's on."""
    sums = []
    for first, *others in islands:
        total = tensors[first].float()
        for rank in others:
            total = total + tensors[rank].float()
        sums.append(total)
    return sums


def expected_hierarchical(tensors, codec, islands):
    """A flat sum over the islands of what each has added up. Rows share nothing, so who owns them does not matter."""
    flat = expected_two_step if len(islands) > 2 or isinstance(codec, CodecPair) else expected_gather_sum
    return flat(island_sums(tensors, islands), codec).to(tensors[0].dtype)


class Wire(TorchDispatchMode):
    """Records everything that goes to torch.distributed, whatever the Python function was called."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank
        self.calls = []  # (collective, bytes received from other ranks)
        self.sources = Counter()  # bytes by the rank of the job that they came from

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
            assert [x.dtype for x in tensors] == [torch.uint8, torch.uint8], f"{function} of {tensors}"
            name, group = function.overloadpacket.__name__, dist.ProcessGroup.unbox(args[2])
            ranks = dist.get_process_group_ranks(group)
            sizes = args[3] if name == "alltoall_base_" else [tensors[1].numel()] * len(ranks)
            assert sum(sizes) == tensors[0].numel()
            received = {rank: size for rank, size in zip(ranks, sizes, strict=True) if rank != self.rank}
            self.calls.append((name, sum(received.values())))
            self.sources.update(received)
        return function(*args, **(kwargs or {}))
