# SPDX-License-Identifier: Apache-2.0
"""What a sum costs on the host: Python, torch and Triton's own launcher, without a GPU and without a wire.

Launches end in a stub of libcuda that does nothing, collectives are over at once, and tensors are small and on the CPU.

Usage: python tests/kernels/ptx/host_cost.py [--codec mxfp4] [--ranks 8] [--rounds 200]

Prints microseconds per call: of the fastest round, and of the slowest one among the fastest tenth, which other work on
the machine disturbs least. Another state of the package goes into PYTHONPATH; compare runs that alternate.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


def nothing(*_, **__) -> None:
    """A collective that is over at once."""


# Before wire/exchange.py takes them by name.
for name in ("all_gather_single", "all_gather_into_tensor", "all_to_all_single"):
    setattr(dist, name, nothing)

from device import load_stub  # noqa: E402

from megatron_comp.wire import codec as codecs  # noqa: E402
from megatron_comp.wire import gpu  # noqa: E402
from megatron_comp.wire.collectives import all_reduce  # noqa: E402

CALLS = 20


def round_us(call) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--codec", default="mxfp4", help="default: mxfp4")
    parser.add_argument("--ranks", type=int, default=8, help="of the group that is not there (default: 8)")
    parser.add_argument("--rounds", type=int, default=200, help=f"of {CALLS} calls each (default: 200)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=args.ranks, store=FakeStore())
    codecs.choose_backend = lambda device_type: gpu
    x, codec = torch.zeros(2 * args.ranks, 256, dtype=torch.bfloat16), codecs.Codec.parse(args.codec)
    with tempfile.TemporaryDirectory() as folder:
        load_stub(Path(folder))
        for algorithm in ("gather_sum", "two_step"):

            def call(algorithm=algorithm):
                all_reduce(x, codec, None, algorithm, chunks=1)

            round_us(call)  # compiles
            times = sorted(round_us(call) for _ in range(args.rounds))
            print(f"{algorithm}: {times[0]:.1f} us at best, {times[len(times) // 10]:.1f} us for a tenth", flush=True)


if __name__ == "__main__":
    main()
