# SPDX-License-Identifier: Apache-2.0
"""Messages of bytes between ranks: the collectives that carry them, and the chunks of rows that they are cut into.

A message that takes long on the wire is cut into chunks of rows, so that one chunk travels while others are encoded and
decoded, and so that the line is never without work. All chunks but the last have whole multiples of 16 rows in each
rank's slice. No section of theirs needs padding then, and together they are as many bytes, in the same slices, as the
message in one piece: the number of chunks changes nothing but time.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .message import ALIGNMENT

Group = dist.ProcessGroup
Work = dist.Work

# A chunk under way: each `next` carries it to where its bytes are on the wire again, the last one to its sum. It yields
# NEAR where that is its last exchange, and inside the island: soon over, and no use of the links between islands.
Steps = Iterator[Any]
NEAR = object()

# A chunk is at least this much of a message. CPU: chosen with gloo on links of 100 Mbit/s, N = 2, 3, 4: all-reduces of
# 4 and 16 MB in mxfp4, 1.1 and 4.5 MB a message, took 96 % of the line rate and more in such chunks, 57 to 96 % in one
# piece; with 512 KB N = 2 fell to 89 %. Isends and irecvs between all pairs carried less than all-gathers and
# all-to-alls. Of a hierarchical sum it is a rank's share of the message: on 2x2 ranks, 1 Gbit/s across, 16 MB in mxfp4
# took all ranks together 98 to 104 ms of processor time in 4 chunks, 114 to 122 in 8 and 145 in 16.
# On other devices nothing was measured: a sum goes in one chunk, since each more costs five launches and two
# collectives; where a calibration predicts that several pay, each is at least PREDICTED_CHUNK_BYTES.
CHUNK_BYTES = {"cpu": 256 * 1024}
PREDICTED_CHUNK_BYTES = 4 * 1024 * 1024
MAX_CHUNKS = 16
# The same of a message that is computed in parts, one of which is sent while others are computed; only on devices where
# that was measured to be faster. SmolLM2, prefill of 1024 tokens in bf16, N = 2 on two cores, 307 KB a message, layers
# overlapped: in 2, 3, 4, 6 parts 0.97, 0.98, 1.04, 1.18 of the time in one piece at 100 Mbit/s; in 2 and 3 parts 1.01
# and 1.06 at 300 Mbit/s, where cores are short, not the link: there a calibration's `hidden` takes one.
OVERLAP_BYTES = {"cpu": 128 * 1024}

# Renamed in torch 2.13, where the old name warns.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def most_chunks(rows: int, slices: int, nbytes: int, of_bytes: int) -> int:
    """Into how many chunks of at least `of_bytes` a message goes, from things equal on all ranks.

    slices: how many ranks the rows of one chunk are dealt out to. nbytes: of the message in one piece.
    """
    return max(1, min(nbytes // of_bytes, MAX_CHUNKS, rows // (ALIGNMENT * slices)))


def chunk_rows(rows: int, slices: int, count: int) -> list[int]:
    """How many of a message's `rows` each of `count` chunks has, or of fewer where there are not rows enough."""
    unit = ALIGNMENT * slices
    units = rows // unit
    count = min(count, units)
    if count < 2:
        return [rows]
    chunks = [(units // count + (number < units % count)) * unit for number in range(count)]
    chunks[-1] += rows % unit
    return chunks


def chunk_bytes(device_type: str) -> int | None:
    """Of a message, in each chunk at least; None: one chunk, whatever the size."""
    return CHUNK_BYTES.get(device_type)


def overlap_bytes(device_type: str) -> int | None:
    """None: what is computed there goes in one piece."""
    return OVERLAP_BYTES.get(device_type)


def all_gather(
    message: torch.Tensor, ranks: int, group: Group | None, async_op: bool
) -> tuple[torch.Tensor, Work | None]:
    """uint8 `[bytes]` to `[ranks, bytes]`, there when the work is done; None if it is."""
    gathered = message.new_empty(ranks, message.numel())
    return gathered, _all_gather_single(gathered.view(-1), message, group=group, async_op=async_op)


def all_to_all(
    sent: torch.Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], group: Group | None, async_op: bool
) -> tuple[torch.Tensor, Work | None]:
    """One buffer of a message for every rank, in rank order, to the buffer of messages from every rank."""
    received = sent.new_empty(sum(receive_sizes))
    work = dist.all_to_all_single(received, sent, [*receive_sizes], [*send_sizes], group=group, async_op=async_op)
    return received, work


def finish(work: Work | None) -> None:
    """Waits: on a GPU the current stream, elsewhere the host.

    If a rank is gone or too late, gloo raises RuntimeError; NCCL's watchdog ends the process.
    """
    if work is not None:
        work.wait()
