# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp search`: a policy of fewest bits, or of least time, within a bound on what it costs in quality."""

import argparse
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..files import beside
from ..launcher import output
from ..policy import CompressionPolicy
from ..search.bound import MAX_INCREASE_PCT, Bound
from ..search.candidates import CANDIDATES, parse_candidates
from . import checks, search_options, setup
from .search_report import report


def check(args: argparse.Namespace) -> None:
    check_search(args)
    if args.max_kl is None and args.max_perplexity_increase is None:
        raise ValueError("a bound is needed: --max-kl, in nats per token, or --max-perplexity-increase, in percent")
    parse_candidates(args.codec)
    if args.predictor and not Path(args.predictor).is_file():
        raise ValueError(f"--predictor {args.predictor}: no such file")
    search_options.check(args)


def check_search(args: argparse.Namespace) -> None:
    checks.check_files(args)
    if args.tp < 2:
        raise ValueError(f"--tp {args.tp}: one rank sums nothing; 2 or more have something to compress")
    checks.check_text(args)
    CompressionPolicy(min_bytes=args.min_bytes)  # refuses what it cannot be
    checks.check_written(args, "out")
    for option in ("max_kl", "max_perplexity_increase"):
        if (given := getattr(args, option)) is not None and not 0 < given < float("inf"):
            raise ValueError(f"--{option.replace('_', '-')} {given}: allowed are numbers above 0")


def run(args: argparse.Namespace) -> None:
    from ..search.mixed import search_mixed
    from ..search.with_drop import search_with_drop
    from ..search.words import Words
    from ..spd.weights import write_blocks

    check(args)
    candidates = parse_candidates(args.codec or list(CANDIDATES))
    searched = {
        "search": "with drop" if args.with_drop else "mixed",
        "candidates": [str(codec) for codec in candidates],
    }
    with measuring(args, args.distilled, args.predictor, **searched) as measurements:
        if args.with_drop:
            itemsize = next(measurements.judge.model.parameters()).dtype.itemsize
            calibration = search_options.calibration(args, candidates, itemsize)
            if output.is_first_rank() and (warning := search_options.untimed(calibration, candidates)):
                print(warning, flush=True)
            words = Words(candidates, args.algorithm, search_options.job(args, itemsize), calibration)
            found = search_with_drop(measurements, bound_of(args), words, args.min_bytes)
        else:
            found = search_mixed(measurements, bound_of(args), candidates, args.algorithm, args.min_bytes)
    if output.is_first_rank():
        if found.distilled:
            write_blocks(args.distilled, found.distilled, args.weights_out)
        if args.predictor:
            relative = beside(args.predictor, args.out)
            found = replace(found, policy=replace(found.policy, predictor=relative))
        how = f"megatron-comp search {'--with-drop ' * args.with_drop}--algorithm {args.algorithm}"
        report(args, found, measurements.judge, how)


@contextmanager
def measuring(args: argparse.Namespace, distilled: str | None = None, predictor: str | None = None, **searched: object):
    """`Measurements` of the model on its ranks and of the text, in the journal of `--state`.

    searched: what else measurements depend on. Bound and algorithm are not of it: others use the same measurements.
    """
    from ..search.measurements import Measurements

    with setup.judging(args, distilled, **searched) as judge:
        if judge.journal.continued and output.is_first_rank():
            print(f"search: going on from {args.state}", flush=True)
        yield Measurements(judge, predictor)


def bound_of(args: argparse.Namespace) -> Bound:
    """The paper's, where none is given."""
    if args.max_kl is not None:
        return Bound("kl", args.max_kl)
    increase = args.max_perplexity_increase
    return Bound("perplexity", MAX_INCREASE_PCT if increase is None else increase)
