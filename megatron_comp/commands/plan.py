"""`megatron-comp plan`: predicted time to first token, and whether to compress."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch

from ..launcher import output
from ..policy import CompressionPolicy
from ..predict import measured
from ..predict.figures import figures_of
from ..predict.hardware import GPUS, WIRES, Shares, gpu_of
from ..predict.models import MODELS, Model, load
from ..predict.times import Job, compute_seconds, sums
from ..spd.blocks import dropped_blocks, layers_that_drop
from ..wire.codec import parse_codec
from ..wire.cost import ALGORITHMS, step_codecs
from . import options

CODECS = ("mxfp4", "int4:32:fp16:hadamard", "int5:32:fp16:hadamard", "int8:32:fp16")
# From here on compressing is worth what it costs in quality; below, the prediction may be all error.
WORTH = 1.05

COLUMNS = {
    "codec": ("codec", ""),
    "algorithm": ("algorithm", ""),
    "ttft_ms": ("TTFT ms", ".1f"),
    "speedup_vs_none": ("x none", ".2f"),
    "share_of_sums": ("sums", ".0%"),
    "compressed": ("compressed", "d"),
    "kept": ("kept", "d"),
    "dropped": ("dropped", "d"),
}

DESCRIPTION = """\
Predict time to first token on a GPU and link, stock and compressed, and say whether to compress. Needs no GPU.
"""
RENAMED = {"--tokens": "--prompt-tokens"}
EPILOG = f"""\
Example:
  megatron-comp plan --model llama-2-70b --tp 8 --gpu L4 --link pcie4x16

models: {", ".join(MODELS)}
GPUs:   {", ".join(GPUS)}
links:  {", ".join(WIRES)} or a rate, as in 100mbit

The model of cost: compute is the larger of flops over 60 % of the GPU's peak and bytes of weights over 80 % of its
memory's rate; a sum takes its bytes over what is reached of the link (NVLink 80 %, a network 90 %, PCIe through the
host's memory 20 %: give a rate where your cards reach more), and a codec moves its bytes at half of the memory's rate,
which is an assumption: nobody has measured the codecs on a GPU. --calibration takes link and codecs from a file of
`megatron-comp calibrate` instead. Quality is not in it: `megatron-comp evaluate` measures that.

--measured prints the error of every row of `megatron-comp bench ttft --json`; then --compute-ms is the time of an
unshaped run without its sums. The errors on published measurements: `python -m research.published` in a checkout.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--check", action=options.Moved, to="python -m research.published")
    options.add_model(parser, "A name below, the folder of a checkpoint, or a config.json.")
    # Not where other subcommands leave --tp and --link: this one starts no ranks.
    options.add_tp(parser, dest="ranks")
    add("--batch", type=int, default=1, metavar="B", help="Number of prompts (default 1).")
    options.add_prompt_tokens(parser, "Number of tokens in each prompt")
    options.add_dtype(parser, "Of weights and sums (default bf16).", "bf16")
    add("--gpu", metavar="NAME", help="The GPU of each rank: a name below.")
    add("--compute-ms", type=float, metavar="MS", help="Measured time of all but the sums, in place of --gpu.")
    add("--link", dest="wire", metavar="L", help="The link of each rank: a name below or a rate, such as 10gbit.")
    add("--calibration", metavar="FILE", help="Link and codecs as `megatron-comp calibrate` measured them.")
    add(
        "--codec",
        action="append",
        metavar="C",
        help=f"A codec or preset. Repeat it for more rows (default: {' '.join(CODECS)}).",
    )
    add("--policy", metavar="FILE", help="A YAML policy: one more row, by its min_bytes and dropped sums.")
    add(
        "--drop",
        type=float,
        metavar="PERCENT",
        help="Add two rows with this share of attention's sums dropped, alone and beside the best codec.",
    )
    add(
        "--measured",
        metavar="FILE",
        help="JSON of `megatron-comp bench ttft`: show the errors of the predictions of its rows instead.",
    )
    options.add_json(parser)


def check(args: argparse.Namespace) -> None:
    options.check_written(args)
    options.at_least_one(args, "batch", "prompt_tokens")
    if args.ranks < 1:
        raise ValueError(f"--tp {args.ranks}: at least one is needed")
    if (args.gpu is None) == (args.compute_ms is None):
        raise ValueError("give --gpu, one of " + ", ".join(GPUS) + ", or --compute-ms, and not both")
    if args.drop is not None and not 0 < args.drop <= 100:
        raise ValueError(f"--drop {args.drop:g}: allowed are percents above 0, up to 100")
    if args.compute_ms is not None and not args.compute_ms > 0:
        raise ValueError(f"--compute-ms {args.compute_ms}: a time above 0 is needed")
    if args.gpu is None and args.calibration is None:
        raise ValueError("--compute-ms needs --calibration, since codecs take time on that machine too")
    if args.wire is None and args.calibration is None:
        raise ValueError("give --link, a name (" + ", ".join(WIRES) + ") or a rate, or --calibration")


def run(args: argparse.Namespace) -> None:
    check(args)
    rows = _plan(args)
    output.write_json(args.json, vars(args), rows)


def _plan(args: argparse.Namespace) -> list[dict]:
    job = Job(load(args.model), args.ranks, args.batch, args.prompt_tokens, _itemsize(args))
    names = args.codec or list(CODECS)
    policies = {args.policy: CompressionPolicy.from_file(args.policy)} if args.policy else {}
    for policy in policies.values():
        policy.check_layers(job.model.layers)
    dropped = blocks_to_drop(job.model, args.drop) if args.drop else []
    if job.model.experts and (dropped or any(map(dropped_blocks, policies.values()))):
        raise ValueError(f"--model {args.model}: a mixture of experts cannot do without attention's sums")
    codecs = [codec for name in names for codec in step_codecs(parse_codec(name))]
    codecs += [codec for policy in policies.values() for codec in policy.codecs()]
    known = figures_of(args, codecs, args.ranks, _itemsize(args))
    compute = args.compute_ms / 1e3 if args.compute_ms else compute_seconds(job, gpu_of(args.gpu), Shares())
    if args.measured:
        rows = measured.rows(args.measured, job, compute, known)
        output.show(f"plan --measured {args.measured}", measured.COLUMNS, rows)
        return rows
    tried = [("none", "all_reduce", CompressionPolicy())]
    for name in names:
        for way in ("two_step",) if ">" in name else ("gather_sum", "two_step"):
            tried.append((name, way, CompressionPolicy(codec=name, algorithm=way, min_bytes=0)))
    rows = [_row(*each, job, compute, known, compute + sums(job, CompressionPolicy(), known).seconds) for each in tried]
    stock, best = rows[0]["ttft_ms"] / 1e3, rows.index(recommended(rows))
    rows += [_row(name, "policy", policy, job, compute, known, stock) for name, policy in policies.items()]
    with_drops, layers = [], layers_that_drop(dropped)
    for name, way, policy in [tried[n] for n in dict.fromkeys((0, best)) if dropped]:
        with_drops.append(_row(name, way, replace(policy, layers=layers), job, compute, known, stock))
    where = f"{args.gpu or 'measured compute'}, {args.wire or args.calibration}"
    title = f"plan: {args.model}, TP={args.ranks}, {args.batch}x{args.prompt_tokens} tokens, {where}"
    output.show(title, COLUMNS, rows + with_drops)
    print(advice(rows, with_drops))
    return rows + with_drops


def _itemsize(args: argparse.Namespace) -> int:
    return getattr(torch, options.dtype_name(args)).itemsize


def blocks_to_drop(model: Model, percent: float) -> list[int]:
    """So much of the blocks, the last ones: which ones makes no difference to the time."""
    count = round(model.layers * percent / 100)
    return list(range(model.layers - count, model.layers))


def _row(name, algorithm, policy, job, compute, known, stock) -> dict:
    """stock: seconds to first token with nothing compressed or dropped."""
    made = sums(job, policy, known, compute)
    ttft = compute + made.seconds
    return {
        "codec": name,
        "algorithm": "+".join(sorted(made.algorithms)) or "all_reduce" if algorithm == "policy" else algorithm,
        "ttft_ms": ttft * 1e3,
        "speedup_vs_none": stock / ttft,
        "share_of_sums": made.seconds / ttft,
        "compressed": made.compressed,
        "kept": 2 * job.model.layers - made.compressed - made.dropped,
        "dropped": made.dropped,
    }


def recommended(rows: list[dict]) -> dict:
    """Of the rows that are within 5 % of the fastest, that of the codec with the least rounding error."""
    fastest = max(rows, key=lambda row: row["speedup_vs_none"])
    near = [row for row in rows if row["ttft_ms"] <= WORTH * fastest["ttft_ms"]]
    judged = [row for row in near if row["algorithm"] in ALGORITHMS[1:]]  # neither stock sums nor a policy's
    if fastest not in judged:
        return fastest
    return min(judged, key=lambda row: (rounding_error(row["codec"], row["algorithm"]), row["ttft_ms"]))


@cache
def rounding_error(name: str, algorithm: str) -> float:
    """Root mean square of what a codec's rounding changes, of normally distributed values with standard deviation 1."""
    steps = step_codecs(parse_codec(name))[: 1 if algorithm == "gather_sum" else 2]
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    errors = [(codec.decode(codec.encode(x), x.shape, x.dtype) - x).square().mean().item() for codec in steps]
    return math.sqrt(sum(errors))


def advice(rows: list[dict], with_drops: Sequence[dict] = ()) -> str:
    """One sentence: whether to compress, and with what; with rows that drop sums, another: what that would add."""
    base, best = rows[0], recommended(rows)
    share = f"sums take {base['share_of_sums']:.0%} of the time to first token"
    if best["speedup_vs_none"] < WORTH:
        said = f"Leave compression off: {share} without it, and nothing here is predicted to gain 5 %."
        best = base
    else:
        what = f"{best['codec']} by {best['algorithm']}"
        if best["dropped"]:
            what += f", {best['dropped']} sums dropped"
        said = (
            f"Compress with {what}: {best['ttft_ms']:.0f} ms instead of {base['ttft_ms']:.0f} predicted, "
            f"{best['speedup_vs_none']:.2f} times as fast, since {share} without it; measure its quality first."
        )
    if not with_drops:
        return said
    dropped = with_drops[0] if best is base else with_drops[-1]
    (before,) = (r for r in rows if (r["codec"], r["algorithm"]) == (dropped["codec"], dropped["algorithm"]))
    beside = "alone" if before is base else f"beside {before['codec']} by {before['algorithm']}"
    return (
        f"{said} Dropping {dropped['dropped']} of attention's sums {beside}: {dropped['ttft_ms']:.0f} ms predicted, "
        f"{before['ttft_ms'] / dropped['ttft_ms']:.2f} times as fast as without; `megatron-comp drop` measures its "
        "quality."
    )
