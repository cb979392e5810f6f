"""`megatron-comp search`: the policy of fewest bits on the wire that keeps a bound on what it costs in quality.

    1. Sensitivity (`sensitivity.py`): one backward pass over the calibration text tells, for every place that sums and
       every candidate codec, the KL that its rounding error alone costs. KL, since perplexity of few tokens is noise.
    2. Choice (`solve.py`): these add up, so the fewest bits within a budget are a knapsack, solved exactly.
    3. Truth (`tune.py`): the chosen policy runs on the text with real compressed sums; the budget is moved until what
       is measured is just within the bound.

`two_step` rounds twice: each phase of each place then is an item of its own. `--with-drop` may also leave out the sum
after attention, and minimises predicted time on a link in the place of bits (`with_drop.py`). `--paper` tries one codec
for all places, as arXiv 2411.09510 did (`paper.py`). With `--state` every step is kept in a file, and the same command
goes on from it; searches with another bound, algorithm, link or distilled weights use the same measurements.
"""

import argparse
import hashlib
from pathlib import Path

from ..launcher import output, ranks
from ..search.bound import MAX_INCREASE_PCT, Bound
from ..search.candidates import CANDIDATES, parse_candidates
from ..search.results import report
from ..version import __version__
from . import options, search_options

ALGORITHMS = ("gather_sum", "two_step")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="folder of a Hugging Face Llama or Mixtral checkpoint"
    )
    parser.add_argument("--tp", type=int, required=True, metavar="N", help="tensor-parallel ranks, 2 or more")
    options.add_text(parser, 4096, "calibration text: not the one to be judged by")
    bound = parser.add_mutually_exclusive_group()
    bound.add_argument("--max-kl", type=float, metavar="X", help="bound: nats a token, to the uncompressed model")
    bound.add_argument("--max-perplexity-increase", type=float, metavar="P", help="bound: percent")
    parser.add_argument(
        "--algorithm",
        choices=ALGORITHMS,
        default="gather_sum",
        help="what the policy will run with (default gather_sum)",
    )
    parser.add_argument(
        "--codec",
        action="append",
        default=[],
        metavar="C",
        help=f"a candidate; give it again for more (default: {len(CANDIDATES)} of 2 to 8 bits)",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="write the policy there")
    parser.add_argument(
        "--min-bytes",
        type=_bytes_or_auto,
        default="auto",
        metavar="BYTES",
        help="min_bytes of the policy: smaller messages stay uncompressed (default auto); the search compresses all",
    )
    parser.add_argument("--state", metavar="FILE", help="keep every step there, and go on from it")
    parser.add_argument("--figure", metavar="FILE", help="draw bits against KL of every tried point")
    parser.add_argument("--csv", metavar="FILE", help="write the rows there")
    parser.add_argument(
        "--paper",
        action="store_true",
        help="one codec for all sums, as arXiv 2411.09510 searched: value x block x scale within a perplexity increase "
        "of 3 %% (or another bound), beside its baselines",
    )
    parser.add_argument(
        "--token-dispatcher", choices=options.TOKEN_DISPATCHERS, default="allgather", help="of a Mixtral"
    )
    search_options.add_arguments(parser)
    options.add_dtype(parser)
    options.add_run_arguments(parser)


def check(args: argparse.Namespace) -> None:
    options.check_files(args)
    if args.tp < 2:
        raise ValueError(f"--tp {args.tp}: one rank sums nothing; 2 or more have something to compress")
    options.check_text(args)
    for option in ("out", "figure", "csv"):
        output.check_file(f"--{option}", getattr(args, option))
    output.check_resumed("--state", args.state)
    if args.max_kl is None and args.max_perplexity_increase is None and not args.paper:
        raise ValueError("a bound is needed: --max-kl, in nats a token, or --max-perplexity-increase, in percent")
    for option in ("max_kl", "max_perplexity_increase"):
        if (given := getattr(args, option)) is not None and not 0 < given < float("inf"):
            raise ValueError(f"--{option.replace('_', '-')} {given}: allowed are numbers above 0")
    if args.paper and (args.codec or args.algorithm != "gather_sum"):
        raise ValueError("--paper has its own candidates and sums by gather_sum: leave --codec and --algorithm out")
    parse_candidates(args.codec)
    search_options.check(args)


def run(args: argparse.Namespace) -> None:
    from ..inference.weight_overrides import WeightOverrides
    from ..quality.windows import read_windows
    from ..search.measurements import Calibration
    from ..search.mixed import search_mixed
    from ..search.paper import search_uniform
    from ..search.state import State
    from ..search.with_drop import Words, search_with_drop
    from ..spd.weights import write_blocks

    check(args)
    candidates = parse_candidates(args.codec or list(CANDIDATES))
    with options.opened(args) as (model, tokenizer), ranks.alone(args.state):
        windows = read_windows(args, tokenizer)
        dtype = next(model.parameters()).dtype
        state = State(args.state, _settings(args, candidates, dtype))
        if state.continued and output.is_first_rank():
            print(f"search: going on from {args.state}", flush=True)
        overrides = WeightOverrides(model, args.model, args.distilled) if args.distilled else None
        calibration = Calibration(model, windows, state, overrides)
        if args.paper:
            found = search_uniform(calibration, _bound(args), args.min_bytes)
        elif args.with_drop:
            figures = search_options.figures(args, candidates, dtype.itemsize)
            if output.is_first_rank() and (warning := search_options.untimed(figures, candidates)):
                print(warning, flush=True)
            words = Words(candidates, args.algorithm, search_options.job(args, dtype.itemsize), figures)
            found = search_with_drop(calibration, _bound(args), words, args.min_bytes)
        else:
            found = search_mixed(calibration, _bound(args), candidates, args.algorithm, args.min_bytes)
    if output.is_first_rank():
        if found.distilled:
            write_blocks(args.distilled, found.distilled, args.weights_out)
        report(args, found, list(state.seen["points"].values()), state.settings)


def _bound(args: argparse.Namespace) -> Bound:
    if args.max_kl is not None:
        return Bound("kl", args.max_kl)
    increase = args.max_perplexity_increase
    return Bound("perplexity", MAX_INCREASE_PCT if increase is None else increase)


def _settings(args: argparse.Namespace, candidates: tuple, dtype) -> dict:
    """All that measurements depend on. Bound and algorithm are not of it: others use them too."""
    config = Path(args.model, "config.json")
    return {
        "model": f"{Path(args.model).name} {_digest(config)}",
        "text": f"{Path(args.text).name} {_digest(Path(args.text))}",
        "tp": args.tp,
        "tokens": args.tokens,
        "context": args.context,
        "dtype": str(dtype).removeprefix("torch."),
        "search": "paper" if args.paper else "with drop" if args.with_drop else "mixed",
        "candidates": [] if args.paper else [str(codec) for codec in candidates],
        "megatron_comp": __version__,
    }


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def _bytes_or_auto(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number of bytes")
    return text if text == "auto" else int(text)
