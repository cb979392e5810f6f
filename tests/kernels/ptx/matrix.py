# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels executed without a GPU, over codecs, operations, shapes and types: the bytes of the reference?

Usage: python tests/kernels/ptx/matrix.py [--capability 80] [--suite shapes] [--every 12] [--codec mxfp4] [--op encode]

Without options the whole matrix, ten minutes to an hour of one core, most of them Triton's; compiled kernels stay in
TRITON_CACHE_DIR. --suite takes a part of what the tests run. A folder with another Triton goes into PYTHONPATH. Prints
the cases that fail, and then fails. What is checked: device.py.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import checks
import torch
import triton
from device import Device
from tqdm import tqdm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--capability", type=int, choices=(80, 90), default=90, help="of the GPU (default: 90)")
    parser.add_argument(
        "--suite", action="append", choices=checks.SUITE, help="of the test suite, not the whole matrix"
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every N-th case (default: all)")
    parser.add_argument("--from", type=int, default=0, dest="first", help="number of the first one (default: 0)")
    parser.add_argument("--codec", action="append", help="only cases of this codec")
    parser.add_argument("--op", action="append", choices=checks.OPERATIONS, help="only cases of this operation")
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = [checks.SUITE[name] for name in args.suite or ()] or [checks.whole_matrix]
    cases = [case for part in parts for case in part()]
    cases = [case for case in cases if case.codec in (args.codec or [case.codec])]
    cases = [case for case in cases if case.operation in (args.op or checks.OPERATIONS)]
    cases = cases[args.first :: args.every]
    if not cases:
        parser.error("no case is left to run")
    started, failed = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        device = Device(Path(folder), args.capability)
        for case in tqdm(cases, unit="case", mininterval=0.1 if sys.stderr.isatty() else 30):
            try:
                case.check(device)
            except Exception as error:
                failed += 1
                tqdm.write(f"FAILED {case}: {type(error).__name__}: {str(error)[-600:]}")
    seconds = time.perf_counter() - started
    print(f"sm_{args.capability}, Triton {triton.__version__}: {len(cases)} cases, {failed} failed, {seconds:.0f} s")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
