# SPDX-License-Identifier: Apache-2.0
"""What a subcommand runs: its model on its ranks, the policies and weights that it runs with, and the text."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..files import digest
from ..launcher import ranks
from ..policy import CompressionPolicy
from ..quality import origin
from ..quality.windows import Text
from ..wire.together import Together
from .options import DTYPES

if TYPE_CHECKING:
    from ..quality.judge import Judge


@dataclass(frozen=True)
class Setting:
    """A policy under the name that tables give it."""

    name: str
    policy: CompressionPolicy


NONE = Setting("none", CompressionPolicy())


def settings(args: argparse.Namespace, codecs: list[str]) -> list[Setting]:
    """One for each codec, then one for each policy file. Raises ValueError or OSError for what is neither."""
    made = []
    for option in ("algorithm", "min_bytes"):
        if getattr(args, option) is not None and not codecs:
            raise ValueError(f"--{option.replace('_', '-')} is for codecs given by --codec; a policy file has its own")
    algorithm, min_bytes = args.algorithm or "auto", args.min_bytes or 0
    for name in codecs:
        try:
            policy = CompressionPolicy(codec=name, algorithm=algorithm, min_bytes=min_bytes)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("policy: codec: ")) from None
        made.append(Setting(name, policy))
    return made + [Setting(file, CompressionPolicy.from_file(file)) for file in args.policy]


def with_baseline(settings: list[Setting]) -> list[Setting]:
    """The settings behind the uncompressed one."""
    return [NONE, *(setting for setting in settings if setting.name != "none")]


def dtype_name(args: argparse.Namespace) -> str:
    """torch's name of `--dtype`, which is settled by the device where it is `auto`."""
    return DTYPES[("bf16" if torch.cuda.is_available() else "fp32") if args.dtype == "auto" else args.dtype]


def overrides(args: argparse.Namespace, model, settings: list[Setting]):
    """`WeightOverrides` of --weights; None without. Raises ValueError if no setting has use for them."""
    if not args.weights:
        return None
    from ..inference.weight_overrides import WeightOverrides

    return WeightOverrides.for_policies(model, args.model, args.weights, [setting.policy for setting in settings])


def trials(settings: list[Setting], found) -> list:
    """`quality.judge.Trial`s of settings, with the weights of `overrides` in the blocks that each drops the sum of."""
    from ..quality.judge import Trial

    return [Trial(each.name, each.policy, tuple(found.blocks_for(each.policy)) if found else ()) for each in settings]


@contextmanager
def opened(args: argparse.Namespace, weights: str | None = None):
    """(model, tokenizer) on this rank, inside its groups. weights: a file that takes some of its own's place."""
    # Here and in the subcommands: Megatron takes seconds to import, and the process that starts the ranks has no use.
    from ..inference.model import build_model, destroy_parallel, init_parallel
    from ..inference.text import read_tokenizer

    init_parallel(args.tp, args.timeout, pipeline_parallel=getattr(args, "pp", 1))
    with Together():
        model = build_model(
            args.model,
            dtype=getattr(torch, dtype_name(args)),
            token_dispatcher=args.token_dispatcher,
            extra_weights=weights,
        )
        tokenizer = read_tokenizer(args.model)
    yield model, tokenizer
    destroy_parallel()


def text_of(args: argparse.Namespace) -> Text:
    return Text(args.text, args.tokens, args.context)


@contextmanager
def judging(args: argparse.Namespace, weights: str | None = None, **measured: object) -> "Iterator[Judge]":
    """A judge of the model on its ranks and of the text, with the journal of --state.

    weights: a file of distilled weights that its trials may use. measured: what else its measurements depend on.
    """
    from ..inference.weight_overrides import WeightOverrides
    from ..quality.journal import Journal
    from ..quality.judge import Judge

    with opened(args) as (model, tokenizer), ranks.alone(args.state):
        text, dtype = text_of(args), next(model.parameters()).dtype
        if predictor := getattr(args, "predictor", None):
            measured["predicted by"] = digest(predictor)
        journal = Journal(args.state, origin.settings(args.model, text, args.tp, dtype, **measured))
        overrides = WeightOverrides(model, args.model, weights) if weights else None
        if overrides:
            overrides.check_predictor(predictor)
        yield Judge(model, text.windows(tokenizer), journal, overrides)
