# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp search`: a policy of fewest bits, or of least time, within a bound on what it costs in quality."""

import argparse
from contextlib import contextmanager

from ..launcher import output, ranks
from ..policy import CompressionPolicy
from ..search.bound import MAX_INCREASE_PCT, Bound
from ..search.candidates import CANDIDATES, parse_candidates
from ..search.results import report
from . import options, search_options

ALGORITHMS = ("gather_sum", "two_step")

DESCRIPTION = """\
Find the policy that sends the fewest bits and keeps a bound on what it costs in quality.

    1. Sensitivity: one backward pass over the calibration text tells, for every place that sums and every candidate
       codec, the KL that its rounding error alone costs. KL, since the perplexity of few tokens is noise.
    2. Choice: these add up, so the fewest bits within a budget are a knapsack problem, which is solved exactly.
    3. Check: the chosen policy runs on the text with real compressed sums. The budget is moved until what is measured
       is just within the bound.

two_step rounds twice, and each phase of each place may have a codec of its own. --with-drop may also leave out the sum
after attention, and minimises predicted time on a link instead of bits.
"""
EPILOG = """\
Example:
  megatron-comp search --model llama --tp 2 --text calibration.txt --max-kl 0.03 --out policy.yaml

With --state, searches with another bound, algorithm, link or distilled weights use the same measurements.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--paper", action=options.Moved, to="python -m research.paper_search")
    add_search(parser)
    parser.add_argument(
        "--algorithm",
        choices=ALGORITHMS,
        default="gather_sum",
        help="The algorithm that the policy will run with (default gather_sum).",
    )
    parser.add_argument(
        "--codec",
        action="append",
        default=[],
        metavar="C",
        help=f"A candidate. Repeat it for more (default: {len(CANDIDATES)} of 2 to 8 bits).",
    )
    search_options.add_arguments(parser)


def add_search(parser: argparse.ArgumentParser) -> None:
    """Of every search: model, text, bound and files."""
    options.add_model(parser)
    options.add_tp(parser, what="Number of tensor-parallel ranks, 2 or more.")
    options.add_text(parser, 4096, "A calibration text. Judge the result by another one.")
    bound = parser.add_mutually_exclusive_group()
    bound.add_argument(
        "--max-kl", type=float, metavar="X", help="The bound: KL to the uncompressed model, in nats per token."
    )
    bound.add_argument(
        "--max-perplexity-increase", type=float, metavar="P", help="The bound: increase of perplexity, in percent."
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="The policy file to write.")
    parser.add_argument(
        "--min-bytes",
        default="auto",
        metavar="BYTES",
        help="The policy leaves smaller messages uncompressed (default auto). The search itself compresses all.",
    )
    options.add_state(parser)
    options.add_csv(parser)
    options.add_figure(parser, "bits against KL of every tried point")
    options.add_token_dispatcher(parser)
    options.add_dtype(parser)
    options.add_run_arguments(parser)


def check(args: argparse.Namespace) -> None:
    check_search(args)
    if args.max_kl is None and args.max_perplexity_increase is None:
        raise ValueError("a bound is needed: --max-kl, in nats per token, or --max-perplexity-increase, in percent")
    parse_candidates(args.codec)
    search_options.check(args)


def check_search(args: argparse.Namespace) -> None:
    options.check_files(args)
    CompressionPolicy(min_bytes=args.min_bytes)
    if args.tp < 2:
        raise ValueError(f"--tp {args.tp}: one rank sums nothing; 2 or more have something to compress")
    options.check_text(args)
    options.check_written(args, "out")
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
    with measuring(args, args.distilled, **searched) as measurements:
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
        how = f"megatron-comp search {'--with-drop ' * args.with_drop}--algorithm {args.algorithm}"
        report(args, found, measurements.judge, how)


@contextmanager
def measuring(args: argparse.Namespace, distilled: str | None = None, **searched: object):
    """`Measurements` of the model on its ranks and of the text, in the journal of `--state`.

    searched: what else measurements depend on. Bound and algorithm are not of it: others use the same measurements.
    """
    from ..inference.weight_overrides import WeightOverrides
    from ..quality.journal import Journal
    from ..quality.judge import Judge
    from ..quality.origin import settings
    from ..quality.windows import read_windows
    from ..search.measurements import Measurements

    with options.opened(args) as (model, tokenizer), ranks.alone(args.state):
        windows, dtype = read_windows(args, tokenizer), next(model.parameters()).dtype
        journal = Journal(args.state, settings(args, dtype, **searched))
        if journal.continued and output.is_first_rank():
            print(f"search: going on from {args.state}", flush=True)
        overrides = WeightOverrides(model, args.model, distilled) if distilled else None
        yield Measurements(Judge(model, windows, journal, overrides))


def bound_of(args: argparse.Namespace) -> Bound:
    """The paper's, where none is given."""
    if args.max_kl is not None:
        return Bound("kl", args.max_kl)
    increase = args.max_perplexity_increase
    return Bound("perplexity", MAX_INCREASE_PCT if increase is None else increase)
