# SPDX-License-Identifier: Apache-2.0
"""A subcommand's model: the policies that it runs under, weights that replace its own, and its ranks."""

import argparse
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..policy import CompressionPolicy
from .options import DTYPES


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


@contextmanager
def opened(args: argparse.Namespace, weights: str | None = None):
    """(model, tokenizer) on this rank, inside its groups. weights: a file that takes some of its own's place."""
    # Here and in the subcommands: Megatron takes seconds to import, and the process that starts the ranks has no use.
    from ..inference.model import build_model, destroy_parallel, init_parallel
    from ..inference.text import read_tokenizer

    init_parallel(args.tp, args.timeout, pipeline_parallel=getattr(args, "pp", 1))
    model = build_model(
        args.model,
        dtype=getattr(torch, dtype_name(args)),
        token_dispatcher=args.token_dispatcher,
        extra_weights=weights,
    )
    yield model, read_tokenizer(args.model)
    destroy_parallel()
