# SPDX-License-Identifier: Apache-2.0
"""Options that several subcommands share: only the standard library is imported, so that `--help` answers at once."""

import argparse

from ..launcher.network import UNSHAPED
from ..wire.algorithms import ALGORITHMS

CONTEXT = 512  # tokens per window of a text
TOKEN_DISPATCHERS = ("allgather", "alltoall")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # with torch's names
# What --link means, for the end of a help text.
LINKS = """\
Links: without --link the ranks meet as they are, in `link` called local (one machine) or network (several). With it
they are started on this machine in network namespaces, joined by links of that rate in each direction: Linux only,
needs root and the commands ip and tc, adds no loss. --machines puts several ranks on one link, which meet by loopback;
--rtt adds latency, by a relay that takes a tenth to a quarter of a core. Such a link lets some 256 KB through at once
after it has been idle, so messages have to be much larger than that; above 1 Gbit/s a few processor cores are the
limit, not the link. The same links for any other command: launch/slow_network.sh.

Threads: every rank gets its share of this machine's processors, or OMP_NUM_THREADS. On two cores, OMP_NUM_THREADS=1 and
two ranks are one thread per core; with more ranks than cores, waiting for a core is in the times.
"""


def min_bytes(text: str) -> int | str:
    """For `--min-bytes`: a number; other text, such as auto and 64k, is for the policy to understand or refuse."""
    try:
        return int(text)
    except ValueError:
        return text


class Moved(argparse.Action):
    """An option of earlier versions that another command has now. to: that command."""

    def __init__(self, *args: object, to: str, **more: object) -> None:
        super().__init__(*args, nargs=0, help=argparse.SUPPRESS, **more)
        self.to = to

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.error(f"{self.option_strings[0]} is now a command of its own, in a checkout of the source: {self.to}")


def add_model(
    parser: argparse.ArgumentParser,
    what: str = "Folder of a Hugging Face Llama or Mixtral checkpoint, or one that `megatron-comp convert` wrote.",
    metavar: str = "DIR",
) -> None:
    parser.add_argument("--model", required=True, metavar=metavar, help=what)


def add_tp(parser: argparse.ArgumentParser, dest: str = "tp", what: str = "Number of tensor-parallel ranks.") -> None:
    """dest: `tp` for what runs on that many ranks, another name for what only reckons with them in one process."""
    parser.add_argument("--tp", dest=dest, type=int, required=True, metavar="N", help=what)


def add_pp(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pp",
        type=int,
        default=1,
        metavar="P",
        help="Number of pipeline stages (default 1). --tp is the number of ranks in each stage. Consecutive ranks form "
        "a stage: with --tp ranks per machine, sums stay inside machines.",
    )


def layout(tp: int, pp: int) -> str:
    """What tables call so many stages of so many ranks each."""
    return f"TP={tp}" + (f", PP={pp}" if pp > 1 else "")


def add_arguments(parser: argparse.ArgumentParser, min_bytes_of: str = "--codec", **dtype: str) -> None:
    """Of a subcommand that runs a model under codecs and policies.

    min_bytes_of: whose messages `--min-bytes` is about. dtype: what `add_dtype` is told.
    """
    add_model(parser)
    add_tp(parser)
    add_pp(parser)
    parser.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="FILE",
        help="A YAML policy: codecs by site, layer and phase (prefill or decode). generate takes one --codec or one "
        "--policy; evaluate and bench ttft take any number of both, and show one row for each.",
    )
    parser.add_argument(
        "--algorithm",
        choices=ALGORITHMS,
        help="How the codecs of --codec are summed (a policy says its own): gather_sum quantizes once and sends N-1 "
        "messages to each rank, two_step quantizes twice and sends 2(N-1)/N of a message, hierarchical adds up inside "
        "machines first, auto (the default) takes what is predicted faster.",
    )
    parser.add_argument(
        "--min-bytes",
        type=min_bytes,
        metavar="BYTES",
        help=f"Of {min_bytes_of}: leave smaller messages uncompressed. The default, 0, compresses every message. auto "
        "leaves those uncompressed that are predicted to gain nothing.",
    )
    add_token_dispatcher(parser)
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="Distilled weights, as `megatron-comp drop distill` writes them for one number of ranks. They replace the "
        "model's own in the layers whose attention sum a policy drops.",
    )
    add_dtype(parser, **dtype)
    add_run_arguments(parser)


def add_token_dispatcher(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--token-dispatcher",
        choices=TOKEN_DISPATCHERS,
        default="allgather",
        help="How Megatron brings the tokens of a Mixtral to their experts (default allgather).",
    )


def add_text(parser: argparse.ArgumentParser, tokens: int, what: str, required: bool = True) -> None:
    """A text, as `quality.windows.Text` has it. tokens: the default. what: help on which text it should be."""
    parser.add_argument("--text", required=required, metavar="FILE", help=what)
    parser.add_argument(
        "--tokens", type=int, default=tokens, metavar="K", help=f"Number of tokens to read from it (default {tokens})."
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="L",
        help=f"Number of tokens per window (default {CONTEXT}, or --tokens if that is less).",
    )


def context_of(args: argparse.Namespace) -> int:
    """`--context`, or what it is where it is not given."""
    return max(2, min(CONTEXT, args.tokens)) if args.context is None else args.context


def add_dtype(
    parser: argparse.ArgumentParser,
    what: str = "Data type of weights, activations and sums; auto (the default) is bf16 on a GPU and fp32 on a CPU.",
    default: str = "auto",
) -> None:
    """Leaves a name of `DTYPES`, or `auto` where that is the default."""
    choices = (*(("auto",) if default == "auto" else ()), *DTYPES)
    parser.add_argument("--dtype", type=_short_name, choices=choices, default=default, help=what)


def _short_name(dtype: str) -> str:
    """torch's own names are understood too."""
    return {long: short for short, long in DTYPES.items()}.get(dtype, dtype)


def add_runs(parser: argparse.ArgumentParser, default: int, what: str = "How often everything is measured") -> None:
    parser.add_argument("--runs", type=int, default=default, metavar="N", help=f"{what} (default {default}).")


def add_prompt_tokens(parser: argparse.ArgumentParser, what: str = "Number of tokens in the prompt") -> None:
    parser.add_argument("--prompt-tokens", type=int, default=1024, metavar="T", help=f"{what} (default 1024).")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add_timeout(parser)
    add_json(parser)


def add_timeout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout",
        type=float,
        default=300,
        metavar="SECONDS",
        help="A rank fails if another rank is silent for this long (default 300).",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", metavar="FILE", help="Write configuration, versions and rows there as one JSON object."
    )


def add_csv(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", metavar="FILE", help="Write the rows there as CSV.")


def add_figure(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--figure", metavar="FILE", help=f"Draw {what} there, as .png, .svg or .pdf; needs matplotlib.")


def add_state(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--state",
        metavar="FILE",
        help="Keep every measurement there; after an interruption the command goes on from it.",
    )


def add_links(parser: argparse.ArgumentParser) -> None:
    """Of a bench that can start its ranks on slower links; `LINKS` explains them."""
    parser.add_argument(
        "--link",
        action="append",
        metavar="RATE",
        help=f"The rate of each machine's link, such as 100mbit, 2.5gbit or {UNSHAPED}, or 1gbit,100mbit for one rate "
        "each; needs root. Repeat it for more.",
    )
    parser.add_argument(
        "--machines",
        type=int,
        metavar="M",
        help="With --link: the number of machines that share out the ranks (default: one machine per rank).",
    )
    parser.add_argument(
        "--rtt", default="0", metavar="TIME", help="With --link: the time of a round trip, such as 1ms (default 0)."
    )
