"""`megatron-comp bench ttft`: time to first token of a prompt, stock and compressed, in one run."""

import argparse
from functools import partial

import torch
import torch.distributed as dist
from tqdm import tqdm

from ...policy import DROP
from .. import output, session
from . import figure, links, options, timing

COLUMNS = {
    "policy": ("policy", ""),
    "algorithm": ("algorithm", ""),
    "tp": ("tp", "d"),
    "link": ("link", ""),
    "prompt_tokens": ("prompt tokens", "d"),
    "dtype": ("dtype", ""),
    "dropped": ("dropped", "d"),
    "ttft_ms": ("TTFT ms, median", ".1f"),
    "p20_ms": ("p20", ".1f"),
    "p80_ms": ("p80", ".1f"),
    "speedup_vs_none": ("x none", ".2f"),
    "bytes_per_rank": ("bytes/rank", ",d"),
}

EPILOG = f"""\
One row a setting, in the table and in the files; the first is the model with stock communication:
  policy         codec of every reduction, or the policy file; none: stock
  algorithm      of the reductions that were compressed, all_reduce where none was
  tp, link, prompt_tokens, dtype
                 what was run
  dropped        sums that the policy leaves out
  ttft_ms, p20_ms, p80_ms
                 milliseconds of a prefill with KV cache, until the last rank has the first token: median over the runs
  speedup_vs_none
                 the median of the stock row over this one's, on the same link
  bytes_per_rank received by rank 0 in the sums of one prefill, stock ones counted as rings
The CSV file adds device, torch, triton, megatron_comp and date.

How: the prompt is random tokens of the vocabulary, as a dense model's time does not depend on them. All settings run in
turn, so that a slow moment hits all alike, each once before anything counts.

{links.EPILOG}
A policy file's `min_bytes: auto` goes by `megatron-comp calibrate`; a codec compresses every message (--min-bytes 0).

--weights are in all rows, the first included: the time does not depend on them.

What the figures do not show: several requests at once, decoding, and what the policy does to the model's predictions,
for which see `megatron-comp evaluate`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    session.add_arguments(parser)
    add = parser.add_argument
    add("--tokens", type=int, default=1024, metavar="K", help="of the prompt (default 1024)")
    add("--codec", action="append", default=[], metavar="C", help="a codec or preset; give it again for more rows")
    links.add_argument(parser)
    add("--runs", type=int, default=5, metavar="N", help="of every setting, in turn (default 5)")
    options.add_files(parser, "the times", json=False)


def check(args: argparse.Namespace) -> list[session.Setting]:
    session.check_files(args)
    links.check(args)
    options.check_files(args)
    options.at_least_one(args, "tokens", "runs")
    return session.with_baseline(session.settings(args, args.codec))


def start(args: argparse.Namespace, argv: list[str]) -> int:
    return links.start(args, argv, args.tp, report)


def run(args: argparse.Namespace) -> None:
    settings = check(args)
    with session.opened(args, args.weights) as (model, _tokenizer):
        rows = measure(model, settings, args.tokens, args.runs)
        circumstances = options.circumstances(model.embedding.word_embeddings.weight.device)
    links.hand_over(args, rows, circumstances, report)


def measure(model, settings: list[session.Setting], tokens: int, runs: int) -> list[dict]:
    """A row a setting, the first of which is the baseline. All ranks call this together."""
    from ...inference.generate import checked_prompt

    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.hf_config.vocab_size, (tokens,), generator=generator)
    ids = checked_prompt(model, prompt, 1)
    step = partial(_prefill, model, ids)
    bar = tqdm(total=(runs + 1) * len(settings), desc="ttft", unit="prefill", disable=not output.is_first_rank())
    traffic, seconds = [], []
    with bar:
        for turn in range(runs + 1):
            took = []
            for setting in settings:
                elapsed, received = step(setting.policy)
                took.append(elapsed)
                traffic.append(received)
                bar.update()
            if turn:  # the first warms up
                seconds.append(took)
    samples = list(zip(*links.slowest(seconds, ids.device)))
    rows = []
    for setting, received, sample in zip(settings, traffic, samples):
        times = timing.percentiles(sample)
        median = times.pop("median_ms")
        rows.append(
            {
                "policy": setting.name,
                "algorithm": "+".join(sorted(received.algorithms)) or "all_reduce",
                "tp": model.config.tensor_model_parallel_size,
                "link": links.here(),
                "prompt_tokens": tokens,
                "dtype": str(model.config.params_dtype).removeprefix("torch."),
                "dropped": received.kept_because[DROP],
                "ttft_ms": median,
                **times,
                "speedup_vs_none": (rows[0]["ttft_ms"] if rows else median) / median,
                "bytes_per_rank": received.received_bytes,
            }
        )
    return rows


def _prefill(model, ids: torch.Tensor, policy):
    """(seconds to the first token on this rank, what the layers sent) after all ranks are ready."""
    from ...inference.generate import generate
    from ...layers.apply import apply_compression, stats

    apply_compression(model, policy)  # counters start at zero
    dist.barrier()
    made = generate(model, ids, 1)
    return made.ttft_seconds, stats(model)


def report(args: argparse.Namespace, rows: list[dict], new: list[dict], circumstances: dict) -> None:
    output.show(f"bench ttft: {args.model}, {circumstances['device']}", COLUMNS, new)
    everything = [row | circumstances for row in rows]
    output.write_json(args.json, vars(args) | {"device": circumstances["device"]}, rows)
    output.write_csv(args.csv, everything)
    if args.figure:
        row = rows[0]
        figure.draw_times(
            *(everything, args.figure, f"Time to first token, {row['prompt_tokens']} tokens, {row['dtype']}"),
            panel=lambda row: f"TP={row['tp']}, {row['link']}",
            bar=lambda row: row["policy"],
            time="ttft_ms",
            speedup="speedup_vs_none",
        )
