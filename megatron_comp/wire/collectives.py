"""Compressed all-reduce and reduce-scatter: bytes are exchanged, every rank decodes and sums in rank order.

Legend: N ranks; a *slot* is the room for one slice's message in a two-step all-gather.

    gather_sum   encode -> all-gather -> decode and sum                                       one quantization
    two_step     encode slices -> all-to-all -> decode and sum -> encode -> all-gather -> decode   two quantizations

A rank's own share goes through the codec like everybody's, so that all ranks end with the same bits
(gather_sum: arXiv 2411.09510, section 3, where the own share stayed exact; two_step: arXiv 2412.04964, algorithm 1).
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from .codec import Codec, CodecPair, parse_codec
from .cost import choose_algorithm, scatter_rows, slice_rows, step_codecs

# Renamed in torch 2.13, where the old name warns.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_reduce(
    x: torch.Tensor,
    codec: Codec | CodecPair | str,
    group: dist.ProcessGroup | None = None,
    algorithm: str = "auto",
) -> torch.Tensor:
    """The sum over the group of every rank's `x` `[..., hidden]`, equal to the bit on all ranks; a new tensor.

    With one rank, or no elements, `x` itself. Shape, dtype, codec and algorithm must be the same on all ranks.
    Raises ValueError for a scalar, an unknown codec or algorithm, or two codecs with `gather_sum`, which has one phase.
    """
    codec = parse_codec(codec) if isinstance(codec, str) else codec
    if x.dim() == 0:
        raise ValueError("all_reduce needs [..., hidden], not a scalar")
    ranks = _ranks(group)
    algorithm = choose_algorithm(x.shape, codec, ranks, algorithm)
    if ranks == 1 or x.numel() == 0:
        return x
    if algorithm == "gather_sum":
        return codec.decode_sum(_all_gather(codec.encode(x), group), x.shape, x.dtype)
    return _two_step(x, codec, group)


def reduce_scatter(
    x: torch.Tensor,
    codec: Codec | str,
    group: dist.ProcessGroup | None = None,
    splits: Sequence[int] | None = None,
) -> torch.Tensor:
    """This rank's slice, along dim 0, of the sum over the group of `x` `[rows, ..., hidden]`.

    splits: rows of each rank's slice, the same on all ranks; without it all slices are equal. One all-to-all, one
    quantization. With one rank, `x` itself. Raises ValueError if the slices do not make up dim 0, or for two codecs.
    """
    codec = parse_codec(codec) if isinstance(codec, str) else codec
    if isinstance(codec, CodecPair):
        raise ValueError(f"reduce_scatter has one phase and takes one codec, not {codec}")
    ranks = _ranks(group)
    splits = scatter_rows(x.shape, ranks, splits)
    if ranks == 1:
        return x
    slices = x.split(splits)
    mine = slices[dist.get_rank(group)].shape
    if x.numel() == 0:
        return x.new_empty(mine)
    sent = torch.cat([codec.encode(part) for part in slices])
    send_sizes = [codec.message_bytes(part.shape) for part in slices]
    received = _all_to_all(sent, send_sizes, [codec.message_bytes(mine)] * ranks, group)
    return codec.decode_sum(received.view(ranks, -1), mine, x.dtype)


def _two_step(x: torch.Tensor, codec: Codec | CodecPair, group: dist.ProcessGroup | None) -> torch.Tensor:
    first, second = step_codecs(codec)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    hidden = x.shape[-1]
    rows = slice_rows(x.shape, ranks)
    slices = x.detach().reshape(-1, hidden).split(rows)

    sent = torch.cat([first.encode(part) for part in slices])
    send_sizes = [first.message_bytes((count, hidden)) for count in rows]
    received = _all_to_all(sent, send_sizes, [send_sizes[rank]] * ranks, group)

    # The first slice is as long as any; shorter ones leave the end of their slot zero.
    slot = received.new_zeros(second.message_bytes((rows[0], hidden)))
    message = first.decode_sum_encode(received.view(ranks, -1), (rows[rank], hidden), second)
    slot[: message.numel()] = message
    slots = _all_gather(slot, group)

    out = torch.empty(sum(rows), hidden, dtype=x.dtype, device=x.device)
    for part, count, its_slot in zip(out.split(rows), rows, slots, strict=True):
        part.copy_(second.decode(its_slot[: second.message_bytes((count, hidden))], (count, hidden), x.dtype))
    return out.view(x.shape)


def _ranks(group: dist.ProcessGroup | None) -> int:
    ranks = dist.get_world_size(group)
    if ranks < 1:
        raise ValueError(f"rank {dist.get_rank()} is not in the group that it was asked to reduce over")
    return ranks


def _all_gather(message: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """uint8 `[bytes]` to `[N, bytes]`."""
    gathered = message.new_empty(dist.get_world_size(group), message.numel())
    _all_gather_single(gathered.view(-1), message, group=group)
    return gathered


def _all_to_all(
    sent: torch.Tensor, send_sizes: list[int], receive_sizes: list[int], group: dist.ProcessGroup | None
) -> torch.Tensor:
    """One buffer of every rank's message, in rank order, to the buffer of messages from every rank."""
    received = sent.new_empty(sum(receive_sizes))
    dist.all_to_all_single(received, sent, receive_sizes, send_sizes, group=group)
    return received
