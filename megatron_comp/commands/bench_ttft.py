# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp bench ttft`: times of prefill and decoding of a model."""

import argparse
import os
import re

import torch
import torch.distributed as dist

from ..bench import plot, timing
from ..bench.circumstances import circumstances
from ..bench.links import here, slowest
from ..launcher import output
from ..launcher.progress import progress
from ..policy import DROP
from . import checks, links, options, preflight, setup

COLUMNS = {
    "layout": ("layout", ""),
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
    "speedup_vs_first": ("x first", ".2f"),
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
    if not links.started_here():
        _layouts(args)
    return setup.with_baseline(setup.settings(args, args.codec))


def _layouts(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The options for every layout. Raises ValueError for one that is not valid, or not of this model."""
    made = [args]
    for text in args.layout:
        if not re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", text):
            raise ValueError(f"--layout {text}: expected TPxPP, both at least 1, as in 2x2")
        tp, pp = map(int, text.split("x"))
        if tp * pp > args.tp * args.pp:
            raise ValueError(f"--layout {text}: more ranks than the {args.tp * args.pp} of --tp and --pp")
        made.append(argparse.Namespace(**{**vars(args), "tp": tp, "pp": pp}))
        preflight.check_inputs(made[-1])
    if args.layout and "WORLD_SIZE" in os.environ:
        raise ValueError("--layout starts ranks of its own, on this machine: leave it out, or leave out torchrun")
    return made


def start(args: argparse.Namespace, argv: list[str]) -> int:
    starts = []
    for each in _layouts(args):
        more = ["--tp", str(each.tp), "--pp", str(each.pp)]
        if each.tp != args.tp:
            more += ["--weights", ""]  # they are for one number of ranks
        starts.append(links.Start(preflight.ranks_of(each), more))
    return links.start(args, argv, starts, report)


def run(args: argparse.Namespace) -> None:
    settings = check(args)[: None if args.tp > 1 else 1]  # one rank has nothing to compress
    with setup.opened(args, args.weights or None) as (model, _tokenizer):
        rows = measure(model, settings, args.prompt_tokens, args.runs, args.new_tokens)
        about = circumstances(next(model.parameters()).device)
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
    tp, pp = model.config.tensor_model_parallel_size, model.config.pipeline_model_parallel_size
    about = {
        "tp": tp,
        "pp": pp,
        "link": here(),
        "prompt_tokens": tokens,
        "dtype": str(model.config.params_dtype).removeprefix("torch."),
    }
    rows = []
    for setting, (received, received_bytes), prefill, decode in zip(settings, traffic, prefills, decodes):
        algorithm = "+".join(sorted(received.algorithms)) or "all_reduce"
        row = {
            "layout": options.layout(tp, pp),
            "policy": setting.name,
            "algorithm": algorithm,
            **about,
            "dropped": received.kept_because[DROP],
        }
        times = timing.percentiles(prefill)
        row |= {"ttft_ms": times.pop("median_ms"), **times}
        row |= zip(("speedup_vs_none", "speedup_low", "speedup_high"), timing.speedup(prefills[0], prefill))
        row["bytes_per_rank"] = received_bytes
        if new_tokens > 1:
            row["decode_ms"] = timing.percentiles(decode)["median_ms"] / (new_tokens - 1)
            row |= zip(tuple(DECODE_COLUMNS)[1:], timing.speedup(decodes[0], decode))
        rows.append(row)
    return rows


def _run(model, ids: torch.Tensor, policy, new_tokens: int):
    """((seconds of prefill, of decoding) on this rank, what `stats_of_all` tells) after all ranks are ready."""
    from ..inference.generate import generate
    from ..inference.stages import stats_of_all
    from ..layers.apply import apply_compression, stats

    apply_compression(model, policy)  # counters start at zero
    dist.barrier()
    made = generate(model, ids, new_tokens)
    tokens = ids.numel() + len(made.tokens) - 1
    return (made.ttft_seconds, made.decode_seconds), stats_of_all(model, stats(model), tokens)


def report(args: argparse.Namespace, rows: list[dict], new: list[dict], circumstances: dict) -> None:
    columns = COLUMNS | (DECODE_COLUMNS if args.new_tokens > 1 else {})
    its_link = [row for row in rows if row["link"] == new[0]["link"]]
    for row in new:
        row["speedup_vs_first"] = its_link[0]["ttft_ms"] / row["ttft_ms"]
    what = f"{args.prompt_tokens} tokens, {new[0]['dtype']}, {circumstances['device']}"
    output.show(f"bench ttft: {args.model}, {what}", columns, its_link)
    everything = [row | circumstances for row in rows]
    output.write_json(args.json, vars(args) | {"device": circumstances["device"]}, everything)
    output.write_csv(args.csv, everything)
    if args.figure:
        row = rows[0]
        plot.draw_times(
            *(everything, args.figure, f"Time to first token, {row['prompt_tokens']} tokens, {row['dtype']}"),
            panel=lambda row: row["link"],
            bar=lambda row: f"{row['layout']}: {row['policy']}",
            time="ttft_ms",
            speedup="speedup_vs_none",
        )
