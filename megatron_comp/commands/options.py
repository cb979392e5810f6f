# SPDX-License-Identifier: Apache-2.0
"""What subcommands share: options and their checks, policies, and the model on its ranks."""

import argparse
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..launcher import output
from ..policy import CompressionPolicy
from ..wire.cost import ALGORITHMS

TOKEN_DISPATCHERS = ("allgather", "alltoall")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # with torch's names


class Moved(argparse.Action):
    """An option of earlier versions that another command has now. to: that command."""

    def __init__(self, *args: object, to: str, **more: object) -> None:
        super().__init__(*args, nargs=0, help=argparse.SUPPRESS, **more)
        self.to = to

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.error(f"{self.option_strings[0]} is now a command of its own, in a checkout of the source: {self.to}")


@dataclass(frozen=True)
class Setting:
    """A policy under the name that tables give it."""

    name: str
    policy: CompressionPolicy


NONE = Setting("none", CompressionPolicy())


def add_model(
    parser: argparse.ArgumentParser,
    what: str = "Folder of a Hugging Face Llama or Mixtral checkpoint, or one that `megatron-comp convert` wrote.",
) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help=what)


def add_tp(parser: argparse.ArgumentParser, dest: str = "tp", what: str = "Number of tensor-parallel ranks.") -> None:
    """dest: `tp` for what runs on that many ranks, another name for what only reckons with them in one process."""
    parser.add_argument("--tp", dest=dest, type=int, required=True, metavar="N", help=what)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of a subcommand that runs a model under codecs and policies."""
    add_model(parser)
    add_tp(parser)
    parser.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="FILE",
        help="A YAML policy: codecs by site, layer and phase. Where the output has rows, repeat it for more of them.",
    )
    parser.add_argument(
        "--algorithm",
        choices=ALGORITHMS,
        help="How the codecs of --codec are summed: gather_sum quantizes once and sends N-1 messages to each rank, "
        "two_step quantizes twice and sends 2(N-1)/N of a message, hierarchical adds up inside machines first, auto "
        "(the default) takes what is predicted faster.",
    )
    parser.add_argument(
        "--min-bytes",
        metavar="BYTES",
        help="Leave smaller messages uncompressed where --codec is used: a number such as 65536 or 64k, or auto "
        "(default 0). A policy file has its own.",
    )
    add_token_dispatcher(parser)
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="Distilled weights, as `megatron-comp drop distill` writes them for one number of ranks. They replace the "
        "model's own in the blocks whose attention sum a policy drops.",
    )
    add_dtype(parser)
    add_run_arguments(parser)


def add_token_dispatcher(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--token-dispatcher",
        choices=TOKEN_DISPATCHERS,
        default="allgather",
        help="How Megatron brings the tokens of a Mixtral to their experts (default allgather).",
    )


def add_text(parser: argparse.ArgumentParser, tokens: int, what: str) -> None:
    """A text, for `quality.windows.read_windows`. tokens: the default. what: help on which text it should be."""
    parser.add_argument("--text", required=True, metavar="FILE", help=what)
    parser.add_argument(
        "--tokens", type=int, default=tokens, metavar="K", help=f"Number of tokens to read from it (default {tokens})."
    )
    parser.add_argument(
        "--context", type=int, default=512, metavar="L", help="Number of tokens per window (default 512)."
    )


def check_text(args: argparse.Namespace) -> None:
    if not 2 <= args.context <= args.tokens:
        raise ValueError(f"--context {args.context}: allowed are 2 to --tokens {args.tokens}")
    if not Path(args.text).is_file():
        raise ValueError(f"--text {args.text}: no such file")


def add_dtype(
    parser: argparse.ArgumentParser,
    what: str = "Of weights, activations and sums; auto (the default) is bf16 on a GPU and fp32 on a CPU.",
    default: str = "auto",
) -> None:
    """Leaves a name of `DTYPES`, or `auto` where that is the default."""
    choices = (*(("auto",) if default == "auto" else ()), *DTYPES)
    parser.add_argument("--dtype", type=_short_name, choices=choices, default=default, help=what)


def _short_name(dtype: str) -> str:
    """torch's own names are understood too."""
    return {long: short for short, long in DTYPES.items()}.get(dtype, dtype)


def dtype_name(args: argparse.Namespace) -> str:
    """torch's name of `--dtype`, which is settled by the device where it is `auto`."""
    return DTYPES[("bf16" if torch.cuda.is_available() else "fp32") if args.dtype == "auto" else args.dtype]


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


def check_timeout(args: argparse.Namespace) -> None:
    if not 0 < args.timeout < 1e7:
        raise ValueError(f"--timeout {args.timeout}: allowed are seconds above 0 and below 10 million")


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


def check_written(args: argparse.Namespace, *names: str) -> None:
    """Before any work. names: of the options, besides `--json`, `--csv`, `--figure` and `--state`, of files to write.

    Raises ValueError that names the option.
    """
    for name in ("json", "csv", "figure", *names):
        output.check_file(f"--{name.replace('_', '-')}", getattr(args, name, None))
    output.check_resumed("--state", getattr(args, "state", None))
    if (figure := getattr(args, "figure", None)) and Path(figure).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--figure {figure}: allowed are names that end in .png, .svg or .pdf")


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Raises ValueError for the first of these options whose number is less."""
    for name in names:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least one is needed")


def shape(text: str, example: str) -> tuple[int, int]:
    """Of `ROWSxHIDDEN`."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise ValueError(f"--shape {text}: expected ROWSxHIDDEN, both at least 1, as in {example}")
    rows, hidden = text.split("x")
    return int(rows), int(hidden)


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


def check_files(args: argparse.Namespace) -> None:
    """Fails before any rank starts on what can be seen from here."""
    if args.tp < 1:
        raise ValueError(f"--tp {args.tp}: at least one rank is needed")
    check_model(args)
    check_timeout(args)
    check_written(args)
    if getattr(args, "weights", None) and not Path(args.weights).is_file():
        raise ValueError(f"--weights {args.weights}: no such file")


def check_model(args: argparse.Namespace) -> None:
    if not Path(args.model).is_dir():
        raise ValueError(f"--model {args.model}: no such folder")


def overrides(args: argparse.Namespace, model, settings: list[Setting]):
    """`WeightOverrides` of --weights; None without. Raises ValueError if no setting has use for them."""
    if not args.weights:
        return None
    from ..inference.weight_overrides import WeightOverrides

    return WeightOverrides.for_policies(model, args.model, args.weights, [setting.policy for setting in settings])


@contextmanager
def opened(args: argparse.Namespace, weights: str | None = None):
    """(model, tokenizer) on this rank, inside its tensor-parallel group. weights: a file that takes some of its own's
    place."""
    # Here and in the subcommands: Megatron takes seconds to import, and the process that starts the ranks has no use.
    from ..inference.model import build_model, destroy_parallel, init_parallel
    from ..inference.text import read_tokenizer

    init_parallel(args.tp, args.timeout)
    model = build_model(
        args.model,
        dtype=getattr(torch, dtype_name(args)),
        token_dispatcher=args.token_dispatcher,
        extra_weights=weights,
    )
    yield model, read_tokenizer(args.model)
    destroy_parallel()
