# SPDX-License-Identifier: Apache-2.0
"""Options of `search --with-drop`, and what they stand for: a link, a prompt, and distilled weights."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..predict.calibrations import calibration_of
from ..predict.hardware import WIRES
from ..predict.models import load
from ..predict.times import Job
from ..search.candidates import CANDIDATES, PRESETS, parse_candidates
from ..wire.calibration import Calibration
from ..wire.codec import Codec
from . import checks
from .arguments.search_options import NAMES, PROMPT_TOKENS


def check(args: argparse.Namespace) -> None:
    given = {name: getattr(args, name) for name in NAMES if getattr(args, name) is not None}
    if not args.with_drop:
        if given:
            raise ValueError(f"{NAMES[next(iter(given))]} is for --with-drop")
        return
    if args.wire is None and args.calibration is None:
        raise ValueError(f"--with-drop needs --link, a rate or one of {', '.join(WIRES)}, or --calibration")
    if args.gpu and args.calibration:
        raise ValueError("--gpu and --calibration both say how long codecs take: leave one out")
    if ("distilled" in given) != ("weights_out" in given):
        raise ValueError("--weights and --weights-out go together: what is chosen of the one is written to the other")
    if args.distilled and not Path(args.distilled).is_file():
        raise ValueError(f"--weights {args.distilled}: no such file")
    checks.check_written(args, "weights_out")
    if args.distilled and Path(args.weights_out).resolve() == Path(args.distilled).resolve():
        raise ValueError(f"--weights-out {args.weights_out}: is --weights, which stays as it is")
    args.prompt_tokens = PROMPT_TOKENS if args.prompt_tokens is None else args.prompt_tokens
    if args.prompt_tokens < 1:
        raise ValueError(f"--prompt-tokens {args.prompt_tokens}: at least one is needed")
    candidates = parse_candidates(args.codec or list(CANDIDATES))
    known = calibration(args, candidates, 2)
    if not any(map(known.knows, candidates)):
        raise ValueError(
            f"--calibration {args.calibration}: it has no candidate's time, only those of {', '.join(known.codecs)}: "
            "`megatron-comp calibrate --codec` measures others"
        )


def calibration(args: argparse.Namespace, candidates: Sequence[Codec], itemsize: int) -> Calibration:
    """Raises what `predict.calibrations.calibration_of` raises."""
    presets = [Codec.parse(name) for name in PRESETS]
    return calibration_of(args.calibration, args.gpu, args.wire, (*candidates, *presets), args.tp, itemsize)


def job(args: argparse.Namespace, itemsize: int) -> Job:
    return Job(load(args.model), args.tp, 1, args.prompt_tokens, itemsize)


def untimed(known: Calibration, candidates: Sequence[Codec]) -> str:
    """What a user should know of candidates that are left out, as nobody has measured their time; empty if there is
    nothing."""
    unknown = [str(codec) for codec in candidates if not known.knows(codec)]
    if not known.codecs:
        return f"search: times are those of messages on a link of {known.source}"
    if not unknown:
        return ""
    return (
        f"search: {known.source} has no time of {len(unknown)} of {len(candidates)} candidates, such as {unknown[0]}: "
        "they are left out; `megatron-comp calibrate --codec` measures them"
    )
