# SPDX-License-Identifier: Apache-2.0
"""The C of the CPU backend under the compiler's address and undefined-behaviour sanitizers, on random input.

Usage: python tests/wire/fuzz.py [--minutes M] [--seed N]

Random codecs (every preset first), shapes, types, values and bits of values; messages as encoded, with flipped bits,
and of random bytes, each in a block of memory of exactly its size. Every result must be the reference's, to the bit.
Ends with status 1 at the first one that is not, and where the C reads or writes what is not its own.
"""

import argparse
import ctypes
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]  # for who runs this file by hand

import oracles  # noqa: E402

from megatron_comp.wire import message, native, reference  # noqa: E402
from megatron_comp.wire.formats import Format  # noqa: E402

SANITIZERS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# Set in the process that the sanitizer's library was loaded into from the start.
SANITIZED = "MEGATRON_COMP_FUZZ"

HIDDEN = [1, 2, 3, 7, 8, 9, 15, 16, 31, 33, 63, 64, 65, 127, 255, 256, 257, 511, 513, 1000, 1024, 1025, 2049, 4097]


def libraries(compiler: tuple[str, ...]) -> str | None:
    """What LD_PRELOAD must name, the compiler's own address sanitizer first; None if it has none."""
    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):
        asked = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True)
        paths.append(asked.stdout.strip())
    return ":".join(paths) if all(map(os.path.isabs, paths)) else None


def start(*arguments: str) -> subprocess.Popen:
    """This file's work in a process of its own. Raises RuntimeError without a compiler that has the sanitizers."""
    preload = libraries(native.compiler()) if native.compiler() else None
    if preload is None:
        raise RuntimeError(f"no address sanitizer of {native.compiler()}: it needs gcc with libasan")
    environment = {
        **os.environ,
        SANITIZED: "1",
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


class Memory:
    """Blocks of exactly as many bytes as are asked for: what lies beside them is the sanitizer's."""

    def __init__(self):
        self.libc = ctypes.CDLL(None)
        self.libc.malloc.restype, self.libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        self.libc.free.argtypes = [ctypes.c_void_p]
        self.blocks = []

    def empty(self, *shape, dtype=None):
        dtype = dtype or torch.uint8
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        self.blocks.append(self.libc.malloc(nbytes))
        return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(self.blocks[-1]), dtype=dtype).view(shape)

    def copy(self, x):
        return self.empty(*x.shape, dtype=x.dtype).copy_(x)

    def free(self):
        for block in self.blocks:
            self.libc.free(block)
        self.blocks.clear()


class Fuzz:
    def __init__(self, seed):
        self.random, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.codecs = iter([*oracles.PRESETS, *self.random.sample(oracles.all_codecs(), len(oracles.all_codecs()))])
        self.dtypes = [torch.float32, torch.bfloat16, torch.float16]
        self.memory, self.calls, self.damaged = Memory(), 0, 0

    def codec(self):
        return Format.parse(next(self.codecs, None) or self.random.choice(oracles.all_codecs()))

    def both(self, function, empty, *inputs, **options):
        """What a function of the C and of the reference write; they must be the same."""
        ours, theirs = empty(), empty()
        getattr(native, function)(*inputs, ours, **options)
        getattr(reference, function)(*inputs, theirs, **options)
        self.calls += 1
        same = torch.equal(ours, theirs) if ours.dtype == torch.uint8 else oracles.same_bits(ours, theirs)
        if not same:
            shapes = [tuple(each.shape) if torch.is_tensor(each) else str(each) for each in inputs]
            raise SystemExit(f"{function} of {shapes} differs from the reference")
        return ours

    def tensor(self, rows, hidden):
        dtype = self.random.choice(self.dtypes)
        if self.random.random() < 0.5:
            scale = self.random.choice([1, 1e-30, 1e30, 1e-6])
            x = (torch.randn(rows, hidden, generator=self.generator) * scale).to(dtype)
        else:
            x = self.bytes(rows, hidden * dtype.itemsize).view(dtype)
        x = self.memory.copy(x)
        return self.random.choice([x, x, x, x.t().contiguous().t(), x[:1].expand(rows, hidden)])

    def bytes(self, *shape):
        return torch.randint(0, 256, shape, generator=self.generator, dtype=torch.uint8)

    def messages(self, sent):
        """Of several ranks, by kind of damage; some at a distance from each other."""
        ranks, gap, nbytes = self.random.randint(1, 4), self.random.choice([0, 0, 1, 7, 64]), len(sent)
        for kind in ("valid", "flipped", "random"):
            # The last message ends where the block does.
            block = self.memory.empty(ranks * (nbytes + gap) - gap)
            found = block.as_strided((ranks, nbytes), (nbytes + gap, 1))
            found.copy_(self.bytes(ranks, nbytes) if kind == "random" else sent.expand(ranks, nbytes))
            for _ in range(self.random.randint(1, 8) if kind == "flipped" else 0):
                rank, place = self.random.randrange(ranks), self.random.randrange(nbytes)
                found[rank, place] ^= 1 << self.random.randrange(8)
            self.damaged += kind != "valid"
            yield found

    def turn(self):
        """All functions of the C, for one codec and shape."""
        fmt, second = self.codec(), self.codec()
        shape = self.random.choice([1, 1, 2, 3, 5, 17, 40]), self.random.choice([*HIDDEN, self.random.randint(1, 6000)])
        size = [message.layout(each, *shape).nbytes for each in (fmt, second)]
        x, empty = self.tensor(*shape), self.memory.empty
        dtype = self.random.choice(self.dtypes)
        sent = self.both("encode", lambda: empty(size[0]), x, fmt)
        for messages in self.messages(sent):
            self.both("decode_sum", lambda: empty(*shape, dtype=dtype), messages, fmt)
            self.both("decode_sum_encode", lambda: empty(size[1]), messages, shape, fmt, second)
        cut = self.random.randint(0, shape[0])
        rows = (cut, 0, shape[0] - cut)
        sizes = [message.layout(fmt, count, shape[1]).nbytes for count in rows]
        slices = self.both("encode_slices", lambda: empty(sum(sizes)), x, fmt, rows)
        parts = self.memory.copy(torch.stack([self.tensor(*shape).to(dtype) for _ in range(self.random.randint(1, 4))]))
        self.both("sum_encode", lambda: empty(sum(sizes)), parts, fmt, rows)
        each = self.random.choice([1, 1, 2, 3])
        slots = self.memory.copy(self.bytes(3 * each, max(sizes)))
        if self.random.random() < 0.5:
            for slot, sent in zip(slots[::each], slices.split(sizes), strict=True):
                slot[: len(sent)] = sent
        self.both("decode_slices", lambda: empty(*shape, dtype=dtype), slots, fmt, rows, each=each)
        self.memory.free()


def sanitized() -> None:
    del os.environ["LD_PRELOAD"]  # not for the compiler
    native.FLAGS.extend(SANITIZERS)
    native._library()


def work(seconds: float, seed: int) -> None:
    sanitized()
    torch.set_num_threads(1)
    fuzz, end, turns = Fuzz(seed), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        fuzz.turn()
        turns += 1
    print(f"{fuzz.calls} calls in {turns} turns, {fuzz.damaged} of damaged messages, seed {seed}: none differs")


def overrun() -> None:
    """Has the C write one byte too many, which must be noticed."""
    sanitized()
    fmt = Format.parse("int4:32:fp16")
    short = Memory().empty(message.layout(fmt, 3, 64).nbytes - 1)
    native.encode(torch.randn(3, 64), fmt, short)
    print("nothing was noticed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0, metavar="M", help="how long (default 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random (default 0)")
    parser.add_argument("--overrun", action="store_true", help="write one byte too many instead: it must be noticed")
    args = parser.parse_args()
    if SANITIZED in os.environ:
        overrun() if args.overrun else work(60 * args.minutes, args.seed)
        return 0
    process = start(*sys.argv[1:])
    for line in process.stdout:
        print(line, end="", flush=True)
    return process.wait()


if __name__ == "__main__":
    sys.exit(main())
