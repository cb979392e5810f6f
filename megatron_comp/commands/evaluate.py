"""`megatron-comp evaluate`: what compression does to a model's predictions on a text, codec by codec."""

import argparse
import math
import time
from pathlib import Path

from tqdm import tqdm

from ..launcher import output
from ..quality.windows import read_windows
from . import options

COLUMNS = {
    "codec": ("codec", ""),
    "algorithm": ("algorithm", ""),
    "bits_per_value": ("bits/value", ".3f"),
    "perplexity": ("perplexity", ".3f"),
    "perplexity_increase_pct": ("+%", ".2f"),
    "kl": ("KL, nats", ".4f"),
    "top1_agreement": ("top-1", ".4f"),
    "bytes_per_rank": ("bytes/rank", ",d"),
    "seconds": ("s", ".1f"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    options.add_text(parser, 6144, "prose that the model has not been tuned on")
    parser.add_argument(
        "--codec", action="append", default=[], metavar="C", help="a codec or preset; give it again for more rows"
    )


def check(args: argparse.Namespace) -> list[options.Setting]:
    options.check_files(args)
    options.check_text(args)
    return options.with_baseline(options.settings(args, args.codec))


def run(args: argparse.Namespace) -> None:
    settings = check(args)
    with options.opened(args) as (model, tokenizer):
        windows = read_windows(args, tokenizer)
        overrides = options.overrides(args, model, settings)
        rows = evaluate(model, windows, settings, overrides)
    if output.is_first_rank():
        scored = f"{len(windows)} windows of {args.context} tokens, TP={args.tp}"
        output.show(f"evaluate: {Path(args.text).name}, {scored}", COLUMNS, rows)
        output.write_json(args.json, vars(args), rows)


def evaluate(model, windows, settings: list[options.Setting], overrides=None) -> list[dict]:
    """A row for each setting, the first of which is the baseline. windows `[windows, context]`.

    Window by window all settings run in turn, so that no logits need be kept and a slow minute hits all alike.
    overrides: `WeightOverrides`, whose weights settings have in the blocks that they drop the sum of.
    """
    runs = [_Run(setting) for setting in settings]
    steps = [(window, run) for window in windows for run in runs]
    baseline = None
    for window, run in tqdm(steps, desc="evaluate", unit="forward", disable=not output.is_first_rank()):
        if overrides:
            overrides.use(overrides.blocks_for(run.setting.policy))
        said = run.forward(model, window)
        baseline = said if run is runs[0] else baseline
        run.score(model, said, baseline, window)
    return [run.row(runs[0]) for run in runs]


class _Run:
    """One setting on its way through the text."""

    def __init__(self, setting: options.Setting) -> None:
        from ..layers.apply import ModelStats
        from ..quality.metrics import Quality

        self.setting = setting
        self.quality = Quality()
        self.traffic = ModelStats([])
        self.seconds = 0.0

    def forward(self, model, window):
        from ..inference.generate import logits
        from ..layers.apply import apply_compression, stats
        from ..layers.meter import wait_for_device
        from ..quality.metrics import Prediction

        apply_compression(model, self.setting.policy)
        wait_for_device()
        start = time.perf_counter()
        out = logits(model, window[None])[0, :-1]
        wait_for_device()
        self.seconds += time.perf_counter() - start
        self.traffic.sites += stats(model).sites
        return Prediction.of(out, _vocab_start(model), _group(model))

    def score(self, model, said, baseline, window) -> None:
        self.quality.add(said, baseline, window[1:].to(said.best.device), _vocab_start(model), _group(model))

    def perplexity(self) -> float:
        nll = self.quality.nll / self.quality.tokens
        return math.exp(nll) if nll < 700 else math.inf

    def row(self, base: "_Run") -> dict:
        perplexity, base_perplexity = self.perplexity(), base.perplexity()
        return {
            "codec": self.setting.name,
            "algorithm": "+".join(sorted(self.traffic.algorithms)) or "all_reduce",
            "bits_per_value": self.traffic.bits_per_value,
            "perplexity": perplexity,
            "perplexity_increase_pct": 100 * (perplexity / base_perplexity - 1),
            "kl": self.quality.kl / self.quality.tokens,
            "top1_agreement": self.quality.agreements / self.quality.tokens,
            "bytes_per_rank": self.traffic.received_bytes,
            "seconds": self.seconds,
        }


def _vocab_start(model) -> int:
    return model.embedding.word_embeddings.vocab_start_index


def _group(model):
    return model.embedding.word_embeddings.tp_group
