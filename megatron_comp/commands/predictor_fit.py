# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp predictor fit`: predictors of a model's sums."""

import argparse

import torch

from ..launcher import output
from ..launcher.progress import progress
from . import checks, drop_options

COLUMNS = {
    "block": ("layer", "d"),
    "attention_left": ("attention: left", ".3f"),
    "mlp_left": ("MLP: left", ".3f"),
    "experts_left": ("experts: left", ".3f"),
    "response_left": ("response: left", ".3f"),
    "written": ("written", ""),
}


def check(args: argparse.Namespace) -> None:
    drop_options.check(args, "out")
    checks.at_least_one(args, "rank")
    for option in ("most_left", "unseen"):
        if not 0 < getattr(args, option) < 1:
            raise ValueError(
                f"--{option.replace('_', '-')} {getattr(args, option)}: allowed are numbers above 0 and below 1"
            )
    if args.tokens // args.context < 2:
        raise ValueError(f"--tokens {args.tokens}: at least two windows of --context {args.context} are needed")


def run(args: argparse.Namespace) -> None:
    from ..inference.hf import read_config
    from ..predict.models import load
    from ..search.trim import COLUMN, LAYERS
    from ..spd.regression import fit_block, fit_response

    check(args)
    config = read_config(args.model)
    if args.rank > config.hidden_size:
        raise ValueError(f"--rank {args.rank}: the model has {config.hidden_size} values per token")
    layers = range(config.num_hidden_layers)
    unseen = max(1, round(args.tokens // args.context * args.unseen))
    how = {"rank": args.rank, "most_left": args.most_left, "unseen": args.unseen}
    size = {LAYERS: len(layers), COLUMN: 3 * config.hidden_size * args.ranks / load(args.model).multiplications}
    with drop_options.missing_blocks(args, layers, how | size) as (_config, file, missing):
        for block, x, _, rope in progress(missing, "predictor fit", len(layers), initial=len(file.rows), unit="layer"):
            found = fit_block(block, x, rope, args.ranks, args.rank, unseen)
            kept = {site: each.regression for site, each in found.items() if each.left[-1] <= args.most_left}
            left = {f"{site}_left": each.left[-1] for site, each in found.items()}
            if not block.is_mixture:  # which cannot drop a sum
                left["response_left"] = None
                if attention := kept.get("attention"):
                    response, share = fit_response(block, x, rope, attention, args.rank, unseen)
                    left["response_left"] = share
                    if share <= args.most_left:
                        kept["attention"] = attention._replace(response=response)
            tensors: dict[str, torch.Tensor] = {}
            for site, each in kept.items():
                tensors |= each.to(torch.bfloat16).named((block.number, site))
            traces = {"traces": {site: each.trace() for site, each in found.items()}}
            written = {"written": ", ".join(kept) or "none"}
            file.add(block.number, tensors, {"block": block.number, **left, **written, **traces})
    rows = [file.rows[str(layer)] for layer in layers]
    columns = {key: column for key, column in COLUMNS.items() if key in rows[0]}
    output.show(f"predictor fit: rank {args.rank}, TP={args.ranks}", columns, rows)
    output.write_json(args.json, vars(args), rows)
