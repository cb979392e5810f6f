# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp bench ttft`: times of prefill and decoding of a model."""

import argparse

import torch
import torch.distributed as dist

from ..bench import plot, timing
from ..bench.circumstances import circumstances
from ..bench.links import here, slowest
from ..launcher import output
from ..launcher.progress import progress
from ..policy import DROP
from . import checks, links, setup

COLUMNS = {
    "policy": ("policy", ""),
    "algorithm": ("algorithm", ""),
    "link": ("link", ""),
    "dropped": ("dropped", "d"),
    "ttft_ms": ("TTFT ms, median", ".1f"),
    "p20_ms": ("p20", ".1f"),
    "p80_ms": ("p80", ".1f"),
    "speedup_vs_none": ("x none", ".2f"),
    "speedup_low": ("95 % from", ".2f"),
    "speedup_high": ("to", ".2f"),
    "bytes_per_rank": ("bytes/rank", ",d"),
}
DECODE_COLUMNS = {
    "decode_ms": ("decode ms/token", ".1f"),
    "decode_speedup": ("x none", ".3f"),
    "decode_speedup_low": ("95 % from", ".3f"),
    "decode_speedup_high": ("to", ".3f"),
}


def check(args: argparse.Namespace) -> list[setup.Setting]:
    checks.check_files(args)
    links.check(args)
    checks.at_least_one(args, "prompt_tokens", "runs", "new_tokens")
    return setup.with_baseline(setup.settings(args, args.codec))


def start(args: argparse.Namespace, argv: list[str]) -> int:
    return links.start(args, argv, args.tp, report)


def run(args: argparse.Namespace) -> None:
    settings = check(args)
    with setup.opened(args, args.weights) as (model, _tokenizer):
        rows = measure(model, settings, args.prompt_tokens, args.runs, args.new_tokens)
        about = circumstances(model.embedding.word_embeddings.weight.device)
    links.hand_over(args, rows, about, report)


def measure(model, settings: list[setup.Setting], tokens: int, runs: int, new_tokens: int = 1) -> list[dict]:
    """A row a setting, the first of which is the baseline. All ranks call this together."""
    from ..inference.generate import checked_prompt

    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.hf_config.vocab_size, (tokens,), generator=generator)
    ids = checked_prompt(model, prompt, new_tokens)
    count = len(settings)
    bar = progress(total=(runs + 1) * count, desc="ttft", unit="run")
    traffic, seconds = [], []
    with bar:
        for setting in settings:  # warms up, and tells what one prefill sends
            traffic.append(_run(model, ids, setting.policy, 1)[1])
            bar.update()
        for turn in range(runs):
            took = [None] * count
            for number in range(turn, turn + count):  # each is the first in its turn
                took[number % count] = _run(model, ids, settings[number % count].policy, new_tokens)[0]
                bar.update()
            seconds.append(took)
    seconds = slowest(seconds, ids.device)
    prefills, decodes = ([[turn[number][phase] for turn in seconds] for number in range(count)] for phase in (0, 1))
    about = {
        "tp": model.config.tensor_model_parallel_size,
        "link": here(),
        "prompt_tokens": tokens,
        "dtype": str(model.config.params_dtype).removeprefix("torch."),
    }
    rows = []
    for setting, received, prefill, decode in zip(settings, traffic, prefills, decodes):
        algorithm = "+".join(sorted(received.algorithms)) or "all_reduce"
        row = {"policy": setting.name, "algorithm": algorithm, **about, "dropped": received.kept_because[DROP]}
        times = timing.percentiles(prefill)
        row |= {"ttft_ms": times.pop("median_ms"), **times}
        row |= zip(("speedup_vs_none", "speedup_low", "speedup_high"), timing.speedup(prefills[0], prefill))
        row["bytes_per_rank"] = received.received_bytes
        if new_tokens > 1:
            row["decode_ms"] = timing.percentiles(decode)["median_ms"] / (new_tokens - 1)
            row |= zip(tuple(DECODE_COLUMNS)[1:], timing.speedup(decodes[0], decode))
        rows.append(row)
    return rows


def _run(model, ids: torch.Tensor, policy, new_tokens: int):
    """((seconds of prefill, of decoding) on this rank, what the layers sent) after all ranks are ready."""
    from ..inference.generate import generate
    from ..layers.apply import apply_compression, stats

    apply_compression(model, policy)  # counters start at zero
    dist.barrier()
    made = generate(model, ids, new_tokens)
    return (made.ttft_seconds, made.decode_seconds), stats(model)


def report(args: argparse.Namespace, rows: list[dict], new: list[dict], circumstances: dict) -> None:
    columns = COLUMNS | (DECODE_COLUMNS if args.new_tokens > 1 else {})
    what = f"TP={args.tp}, {args.prompt_tokens} tokens, {new[0]['dtype']}, {circumstances['device']}"
    output.show(f"bench ttft: {args.model}, {what}", columns, new)
    everything = [row | circumstances for row in rows]
    output.write_json(args.json, vars(args) | {"device": circumstances["device"]}, everything)
    output.write_csv(args.csv, everything)
    if args.figure:
        row = rows[0]
        plot.draw_times(
            *(everything, args.figure, f"Time to first token, {row['prompt_tokens']} tokens, {row['dtype']}"),
            panel=lambda row: f"TP={row['tp']}, {row['link']}",
            bar=lambda row: row["policy"],
            time="ttft_ms",
            speedup="speedup_vs_none",
        )
