# SPDX-License-Identifier: Apache-2.0
"""Do two checkouts send the same bytes and compute the same logits? For changes that must not change a number.

    python research/compare_checkouts.py OLD [NEW]

For every preset: the bytes of encoded tensors of three types, and the logits of `examples/stock_gpt.py`'s model on two
ranks over gloo under both algorithms. A line per preset says what is equal; the exit status is 1 if anything differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RANKS = 2


def digests() -> dict[str, dict[str, str]]:
    """By preset, digests of what this rank's checkout makes of it. Runs in the checkout's own processes."""
    import hashlib

    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from stock_gpt import build_model

    import megatron_comp as mc
    from megatron_comp.wire.formats import PRESETS

    torch.cuda.current_device = lambda: torch.device("cpu")
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(RANKS)
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1, inference_rng_tracker=True, force_reset_rng=True)
    model = build_model(RANKS)
    x = torch.randn(37, 200, generator=torch.Generator().manual_seed(2))
    ids, places = torch.arange(2, 50)[None], torch.arange(48)[None]
    mask = torch.ones(1, 1, 48, 48, dtype=torch.bool).triu(1)

    def digest(tensor: torch.Tensor) -> str:
        return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]

    found = {}
    for preset in PRESETS:
        codec = mc.Codec.parse(preset)
        found[preset] = {f"{kind} bytes": digest(codec.encode(x.to(getattr(torch, kind)))) for kind in TYPES}
        for algorithm in ("gather_sum", "two_step"):
            mc.apply_compression(model, mc.CompressionPolicy(codec=preset, algorithm=algorithm, min_bytes=0))
            with torch.no_grad():
                logits = model(ids, places, mask, runtime_gather_output=True)
            found[preset][f"{algorithm} logits"] = digest(logits)
    dist.destroy_process_group()
    return found


TYPES = ("float32", "bfloat16", "float16")


def of_checkout(folder: Path) -> list[dict[str, dict[str, str]]]:
    """By rank. Raises CalledProcessError, after what the ranks said, if they fail."""
    with tempfile.TemporaryDirectory() as out:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        path = os.pathsep.join([str(folder), str(folder / "examples")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        subprocess.run([*torchrun, __file__, "--into", out], env=environment, check=True, cwd=folder)
        return [json.loads(Path(out, f"{rank}.json").read_text()) for rank in range(RANKS)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, nargs="?", metavar="OLD", help="folder of a checkout")
    parser.add_argument("new", type=Path, nargs="?", default=Path(__file__).parents[1], metavar="NEW", help="this one")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # one of the ranks
    args = parser.parse_args()
    if args.into:
        Path(args.into, f"{os.environ['RANK']}.json").write_text(json.dumps(digests()))
        return 0
    if args.old is None:
        parser.error("give the folder of the old checkout")
    old, new = of_checkout(args.old.resolve()), of_checkout(args.new.resolve())
    differs, pairs = False, list(zip(old, new, strict=True))
    for preset in new[0]:
        different = [what for what in new[0][preset] if any(a[preset][what] != b[preset][what] for a, b in pairs)]
        differs |= bool(different)
        print(f"{preset:24}", f"differs: {', '.join(different)}" if different else "equal bytes and logits")
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
