# SPDX-License-Identifier: Apache-2.0
"""What predicted rows say: whether to compress, with what, what else to consider, and how to check it."""

import math
from collections.abc import Sequence
from functools import cache

import torch

from ..layers.predictor_file import inner_sizes
from ..policy import CompressionPolicy
from ..wire.calibration import Calibration
from ..wire.codec import parse_codec
from ..wire.traffic import step_codecs
from .hardware import Gpu
from .layouts import Layout
from .times import Job, logits_bytes, logits_seconds

# From here on compressing is worth what it costs in quality; below, the prediction may be all error.
WORTH = 1.05

# New tokens of the request that layouts are compared on.
ANSWER = 100

# Of each rank, in a policy that nobody has given.
CANDIDATES = 8

# KL to the uncompressed model in nats per token, of the conditions below: docs/results.md.
QUALITY = {
    ("int8:32:fp16", "gather_sum"): 0.0025,
    ("int8:32:fp16", "two_step"): 0.0033,
    ("nvfp4", "gather_sum"): 0.0591,
    ("mxfp4", "gather_sum"): 0.1736,
    ("mxfp6", "gather_sum"): 0.0118,
    ("mxfp8", "gather_sum"): 0.0112,
    ("int4:32:fp16", "gather_sum"): 0.1272,
    ("int4:32:fp16:hadamard", "gather_sum"): 0.0568,
    ("int4:32:fp16:hadamard", "two_step"): 0.1188,
    ("int4:32:fp16:hadamard>int8:32:fp16", "two_step"): 0.0583,
    ("int5:32:fp16:hadamard", "two_step"): 0.0310,
}
CONDITIONS = "SmolLM2-135M on 3 ranks, docs/results.md"
PREDICTED = "At equal bits predictors took 23 to 48 % off the KL of SmolLM2-135M, docs/quality.md; measure yours."


def recommended(rows: Sequence[dict], key: str = "ttft_ms") -> dict:
    """The row with the least rounding error among those within 5 % of the fastest."""
    fastest = min(rows, key=lambda row: row[key])
    near = [row for row in rows if row[key] <= WORTH * fastest[key]]
    judged = [row for row in near if row["rounds"]]  # neither stock sums nor a policy's
    if fastest not in judged:
        return fastest
    return min(judged, key=lambda row: (rounding_error(row["codec"], row["rounds"]), row[key]))


@cache
def rounding_error(name: str, rounds: int) -> float:
    """Root mean square of what a codec's rounding changes, of normally distributed values with standard deviation 1.

    rounds: how often a value is rounded, once or twice.
    """
    steps = step_codecs(parse_codec(name))[:rounds]
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    errors = [(codec.decode(codec.encode(x), x.shape, x.dtype) - x).square().mean().item() for codec in steps]
    return math.sqrt(sum(errors))


def advice(rows: Sequence[dict], with_drops: Sequence[dict] = ()) -> str:
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


def decode_advice(rows: Sequence[dict]) -> str:
    """One sentence on decoding, for rows of one layout, the first of which is stock."""
    base, best = rows[0], best_of(rows, "decode_ms")
    if best is base:
        return (
            f"Decoding: leave its sums as they are, {base['decode_ms']:.1f} ms per token; `phases: {{decode: none}}`."
        )
    return (
        f"Decoding: {best['codec']} by {best['algorithm']}, {best['decode_ms']:.1f} ms per token instead of "
        f"{base['decode_ms']:.1f}, {base['decode_ms'] / best['decode_ms']:.2f} times as fast."
    )


def logits_advice(job: Job, decode_ms: float, policy: CompressionPolicy | None, known: Calibration) -> str:
    """What the gather of logits takes of a decoded token, and what a policy's `logits` would make of it.

    job: of decoding. decode_ms: of a token with stock sums. policy: whose `logits` is shown, if it has one.
    """
    few = (policy and policy.logits) or CANDIDATES
    whole, less = CompressionPolicy(), CompressionPolicy(logits=few)
    took, takes = (1e3 * logits_seconds(job, each, known) for each in (whole, less))
    return (
        f"Logits: each rank receives {logits_bytes(job, None) / 1e3:,.1f} kB of them per token, {took:.1f} of "
        f"{decode_ms:.1f} ms; with `logits: {few}` in a policy (greedy decoding, and top-k up to {few}) "
        f"{logits_bytes(job, few) / 1e3:,.1f} kB, {takes:.1f} ms."
    )


def predictor_advice(path: str, job: Job, policy: CompressionPolicy) -> str:
    """What a policy's predictors add to a rank, by their file's shapes, and how much less KL was measured with some.

    Raises OSError or ValueError for a file that is damaged, or not of the job's ranks and values per token.
    """
    model = job.model
    sizes, responses = inner_sizes(path, job.tp, model.hidden)
    products = 3 * sum(sizes) * model.hidden  # down, and up to this rank's part and to the sum of all
    values = products + 2 * len(sizes) * model.hidden  # biases
    values += sum(2 * k + 1 for k in responses.values()) * model.hidden
    products += 2 * sum(k for layer, k in responses.items() if policy.drops(layer)) * model.hidden
    return (
        f"Predictor: {len(sizes)} of {2 * model.layers} sums; adds {values * job.itemsize / 1e6:,.1f} MB "
        f"of weights to each rank, and {products * job.tp / model.multiplications:.1%} to its layers' multiplications "
        f"(not in the times below). {PREDICTED}"
    )


def best_of(rows: Sequence[dict], key: str) -> dict:
    """The recommended row, or the first, stock one, where no other gains 5 % over it."""
    best = recommended(rows, key)
    return best if rows[0][key] >= WORTH * best[key] else rows[0]


def layouts_advice(rows: Sequence[dict]) -> str:
    """The verdict on layouts: which is fastest for a whole request, which in either phase, and whether to compress."""
    best = {}  # of each layout, the best row in either phase
    for name in dict.fromkeys(row["layout"] for row in rows):
        of_layout = [row for row in rows if row["layout"] == name]
        best[name] = best_of(of_layout, "ttft_ms"), best_of(of_layout, "decode_ms")
    request = {name: prefill["ttft_ms"] + ANSWER * decode["decode_ms"] for name, (prefill, decode) in best.items()}
    # A layout must be worth the change from those before it: from the one asked for, and from a single machine.
    name = next(name for name in request if request[name] <= WORTH * min(request.values()))
    first, token = best[name]
    prefill = min((pair[0] for pair in best.values()), key=lambda row: row["ttft_ms"])
    decode = min((pair[1] for pair in best.values()), key=lambda row: row["decode_ms"])
    said = (
        f"A prompt and {ANSWER} new tokens are fastest with {name}: {first['ttft_ms']:.0f} ms to the first token "
        f"({_sums(first)}), {token['decode_ms']:.1f} ms per token ({_sums(token)}). Fastest to the first token: "
        f"{prefill['layout']} ({_sums(prefill)}), {prefill['ttft_ms']:.0f} ms. Fastest per token: {decode['layout']} "
        f"({_sums(decode)}), {decode['decode_ms']:.1f} ms."
    )
    if first["codec"] == token["codec"] == "none":
        return f"Do not use this project here: the fastest layout compresses nothing. {said}"
    return said if name == rows[0]["layout"] else f"Do not spread tensor parallelism over machines here. {said}"


def _sums(row: dict) -> str:
    return "stock sums" if row["codec"] == "none" else f"{row['codec']} by {row['algorithm']}"


def best_rows(rows: Sequence[dict]) -> list[dict]:
    """Of every layout the stock row and the best ones in either phase; of the first also the best by each algorithm,
    and a policy's."""
    first, wanted = rows[0]["layout"], []
    for name in dict.fromkeys(row["layout"] for row in rows):
        of_layout = [row for row in rows if row["layout"] == name]
        wanted += [of_layout[0], best_of(of_layout, "ttft_ms"), best_of(of_layout, "decode_ms")]
        for way in dict.fromkeys(row["algorithm"] for row in of_layout if name == first):
            wanted.append(recommended([row for row in of_layout if row["algorithm"] == way]))
        wanted += [row for row in of_layout if row["rounds"] is None]
    return [row for row in rows if any(row is each for each in wanted)]


def memory_advice(layouts: Sequence[Layout], job: Job, gpu: Gpu) -> str:
    """What every layout needs of a GPU, and for which that is too much."""
    needed = "; ".join(f"{layout.name}: {layout.memory_bytes(job) / 1e9:.0f}" for layout in layouts)
    tight = ", ".join(layout.name for layout in layouts if not layout.fits(job, gpu))
    return f"Memory of each GPU, GB of {gpu.memory_gb:.0f}: {needed}" + (f"; too much for {tight}." if tight else ".")


def how_to_check(row: dict, ranks: int, itemsize: int) -> list[str]:
    """What is known of a row's quality, and the commands that check it on all machines; empty for stock sums."""
    if row["codec"] == "none":
        return []
    how = f"--policy {row['codec']}" if row["rounds"] is None else f"--codec '{row['codec']}'"
    by = "" if row["rounds"] is None else f" --algorithm {row['algorithm']}"
    return [
        quality(row, itemsize),
        "Check it, with the same line on every machine (docs/machines-and-slurm.md):",
        f"  megatron-comp calibrate --tp {ranks} {how}",
        f"  megatron-comp evaluate --model DIR --tp {ranks} {how}{by} --text prose.txt",
        f"  megatron-comp bench ttft --model DIR --tp {ranks} {how}{by} --new-tokens 32",
    ]


def quality(row: dict, itemsize: int) -> str:
    """What is known of a compressed row's quality."""
    if row["rounds"] is None:
        return "Quality: measure it."
    name, way = row["codec"], row["algorithm"]
    said = f"Quality: {name} sends {row['bits_per_value']:.2f} bits per value in place of {8 * itemsize}. "
    alike = ("gather_sum", "two_step")[row["rounds"] - 1]
    kl = QUALITY.get((name, alike))
    if kl is None:
        return f"{said}Its KL by {way} is not known: measure it."
    figure = f"KL of {kl:.4f} nats per token ({CONDITIONS})"
    if way == alike:
        return f"{said}By {way} it had a {figure}; measure it on your model."
    return f"{said}By {way} it was not measured: measure it. By {alike}, which rounds as often, it had a {figure}."
