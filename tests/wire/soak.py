# SPDX-License-Identifier: Apache-2.0
"""Random sums over gloo ranks, for as long as one likes: equal bits everywhere, and nothing that grows.

Usage: python tests/wire/soak.py [--minutes M] [--ranks N] [--seed S]

Random codecs and pairs of them, algorithms, chunks, shapes, strides and types, reduce-scatters among them; up to five
sums under way at a time. Every result is compared with that of one process, and all ranks' results with each other.
Memory and file descriptors at the end must be what they were after a while.
"""

import argparse
import os
import random
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]  # for who runs this file by hand

import oracles  # noqa: E402
from ranks import run_ranks  # noqa: E402
from sums import digest, expected_gather_sum, expected_two_step  # noqa: E402

from megatron_comp.wire.codec import Codec, CodecPair, parse_codec  # noqa: E402
from megatron_comp.wire.collectives import all_reduce, reduce_scatter  # noqa: E402

HIDDEN = [1, 3, 7, 8, 31, 32, 33, 64, 100, 129, 256, 576, 1000]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TURN = 20  # sums between two comparisons of ranks
# Caches of plans, layouts and codecs fill up at first, and an allocator keeps some of what it had.
GROWTH_MB = 64


class Soak:
    """One rank's share of random sums, which all ranks choose alike."""

    def __init__(self, rank, world_size, seed):
        self.rank, self.ranks, self.random = rank, world_size, random.Random(seed)
        self.pending, self.digests, self.sums = [], [], 0

    def codec(self):
        return self.random.choice(oracles.all_codecs())

    def tensors(self):
        """What each rank adds: known to all, so that each can do the sum by itself."""
        choose = self.random
        lead = choose.choice([(), (choose.randint(0, 70),), (choose.randint(0, 20), choose.randint(1, 4))])
        shape, dtype = (*lead, choose.choice(HIDDEN)), choose.choice(DTYPES)
        generator = torch.Generator().manual_seed(choose.randrange(2**40))
        scale, odd = choose.choice([1.0, 1e-6, 1e4]), choose.random()
        made = [(torch.randn(shape, generator=generator) * scale).to(dtype) for _ in range(self.ranks)]
        if odd < 0.05 and made[0].numel():
            made[choose.randrange(self.ranks)].view(-1)[0] = choose.choice([float("nan"), float("inf")])
        return [x.t().contiguous().t() if odd > 0.8 and x.dim() == 2 else x for x in made]

    def step(self):
        """Starts a sum or does one, and takes results until few are under way."""
        choose, tensors = self.random, self.tensors()
        x, codec = tensors[self.rank].clone(), parse_codec(self.codec())
        if choose.random() < 0.15 and x.dim() >= 2:
            self.scatter(x, codec, tensors)
        else:
            algorithm = choose.choice(["gather_sum", "two_step"])
            if algorithm == "two_step" and choose.random() < 0.3:
                codec = CodecPair(codec, Codec.parse(self.codec()))
            chunks, asynchronous = choose.choice([None, None, 1, 2, 3, 5, 16, 1000]), choose.random() < 0.5
            result = all_reduce(x, str(codec), algorithm=algorithm, async_op=asynchronous, chunks=chunks)
            if asynchronous:
                x.fill_(777.0)  # the sum does not need it any more
            self.pending.append((result, tensors, codec, algorithm))
        self.sums += 1
        for _ in range(len(self.pending) - choose.randint(0, 4)):
            self.take()

    def scatter(self, x, codec, tensors):
        """A reduce-scatter gives each rank its rows of the sum that a gather_sum gives all."""
        cuts = sorted(self.random.randint(0, len(x)) for _ in range(self.ranks - 1))
        splits = [b - a for a, b in zip([0, *cuts], [*cuts, len(x)], strict=True)]
        asynchronous = self.random.random() < 0.5
        if asynchronous:
            while self.pending:
                self.take()
        out = reduce_scatter(x, str(codec), splits=splits, async_op=asynchronous)
        out = out.wait() if asynchronous else out
        first = sum(splits[: self.rank])
        if out.numel():
            self.check(out, expected_gather_sum(tensors, codec)[first : first + len(out)], "reduce_scatter", codec)

    def take(self):
        result, tensors, codec, algorithm = self.pending.pop(0)
        result = result if torch.is_tensor(result) else result.wait()
        self.digests.append(digest(result.reshape(-1).clone()))  # of one column, any stride is contiguous
        if result.numel():
            expected = expected_gather_sum if algorithm == "gather_sum" else expected_two_step
            self.check(result, expected(tensors, codec), algorithm, codec)

    def check(self, found, expected, what, codec):
        assert oracles.same_bits(found.contiguous(), expected.contiguous()), (
            f"sum {self.sums}: {what} of {codec}, {tuple(found.shape)} {found.dtype} is not what one process gets"
        )

    def compare(self):
        """All ranks' results since the last time; NaN, too, has the same bits everywhere."""
        while self.pending:
            self.take()
        everybodys = [None] * self.ranks
        dist.all_gather_object(everybodys, self.digests)
        assert all(digests == everybodys[0] for digests in everybodys), f"ranks differ before sum {self.sums}"
        self.digests.clear()


def held():
    """(resident megabytes, open descriptors) of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd"))


def soak(rank, world_size, seconds, seed, tell):
    """(sums, megabytes and descriptors after a quarter of the time, and at the end)"""
    work, start, early = Soak(rank, world_size, seed), time.monotonic(), None
    while True:
        passed = torch.tensor(time.monotonic() - start)
        dist.broadcast(passed, 0)  # all ranks stop at one sum
        if early is None and passed > seconds / 4:
            early = held()
        if passed > seconds:
            return work.sums, early or held(), held()
        for _ in range(TURN):
            work.step()
        work.compare()
        if tell and rank == 0 and work.sums % (50 * TURN) == 0:
            print(f"{work.sums} sums in {passed:.0f} s, {held()[0]:.0f} MB", flush=True)


def run(minutes, ranks, seed, tell=False):
    """The sums of a run. Raises AssertionError for wrong bits and for what has grown."""
    results = run_ranks(soak, ranks, 60 * minutes, seed, tell, timeout=60 * minutes + 120)
    for rank, (_, (megabytes, descriptors), (megabytes_then, descriptors_then)) in enumerate(results):
        assert megabytes_then < megabytes + GROWTH_MB, f"rank {rank}: {megabytes:.0f} MB, then {megabytes_then:.0f}"
        assert descriptors_then <= descriptors, f"rank {rank}: {descriptors} descriptors, then {descriptors_then}"
    return results[0][0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0, metavar="M", help="how long (default 1)")
    parser.add_argument("--ranks", type=int, default=3, metavar="N", help="on this machine (default 3)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all that is random (default 0)")
    args = parser.parse_args()
    print(
        f"{run(args.minutes, args.ranks, args.seed, tell=True)} sums on {args.ranks} ranks: none differs, nothing grew"
    )


if __name__ == "__main__":
    main()
