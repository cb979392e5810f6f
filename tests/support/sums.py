"""Compressed sums as one process computes them, in plain fp32 additions, and a record of what ranks really exchange."""

import hashlib
import math

import oracles
import torch
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


class Wire(TorchDispatchMode):
    """Records everything that goes to torch.distributed, whatever the Python function was called."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank
        self.calls = []  # (collective, bytes received from other ranks)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
            assert [x.dtype for x in tensors] == [torch.uint8, torch.uint8], f"{function} of {tensors}"
            name, received = function.overloadpacket.__name__, tensors[0].numel()
            if name == "_allgather_base_":
                received -= tensors[1].numel()
            elif name == "alltoall_base_":
                received -= args[3][self.rank]
            self.calls.append((name, received))
        return function(*args, **(kwargs or {}))
