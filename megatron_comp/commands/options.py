"""What every subcommand that runs a model shares: its arguments, its policies, and the model on its ranks."""

import argparse
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..launcher import output
from ..policy import CompressionPolicy
from ..wire.cost import ALGORITHMS

TOKEN_DISPATCHERS = ("allgather", "alltoall")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Setting:
    """A policy under the name that tables give it."""

    name: str
    policy: CompressionPolicy


NONE = Setting("none", CompressionPolicy())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="folder of a Hugging Face Llama or Mixtral, or of `convert`"
    )
    parser.add_argument("--tp", type=int, required=True, metavar="N", help="tensor-parallel ranks")
    parser.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML policy: codecs by site, layer and phase, min_bytes; where there are rows, give it again for more",
    )
    parser.add_argument(
        "--algorithm",
        choices=ALGORITHMS,
        help="of the codecs given by --codec: gather_sum quantizes once and sends N-1 messages to each rank, two_step "
        "quantizes twice and sends 2(N-1)/N of one, hierarchical adds up inside machines first; auto (the default) "
        "takes what is predicted faster",
    )
    parser.add_argument(
        "--min-bytes",
        type=int,
        metavar="BYTES",
        help="of the codecs given by --codec: smaller messages stay uncompressed (default 0: all are compressed; "
        "a policy file has its own)",
    )
    parser.add_argument(
        "--token-dispatcher",
        choices=TOKEN_DISPATCHERS,
        default="allgather",
        help="of a Mixtral: how Megatron brings tokens to their experts (default allgather)",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="safetensors whose weights take the place of the model's own in the blocks whose sum a policy drops, as "
        "`megatron-comp drop distill` writes for a number of ranks",
    )
    add_dtype(parser)
    add_run_arguments(parser)


def add_text(parser: argparse.ArgumentParser, tokens: int, what: str) -> None:
    """A text, for `quality.windows.read_windows`. tokens: the default. what: the text should be."""
    parser.add_argument("--text", required=True, metavar="FILE", help=what)
    parser.add_argument("--tokens", type=int, default=tokens, metavar="K", help=f"how much of it (default {tokens})")
    parser.add_argument("--context", type=int, default=512, metavar="L", help="in windows of so many (default 512)")


def check_text(args: argparse.Namespace) -> None:
    if not 2 <= args.context <= args.tokens:
        raise ValueError(f"--context {args.context}: allowed are 2 to --tokens {args.tokens}")
    if not Path(args.text).is_file():
        raise ValueError(f"--text {args.text}: no such file")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU, else float32")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add_timeout(parser)
    add_json(parser)


def add_timeout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout",
        type=float,
        default=300,
        metavar="SECONDS",
        help="after which a rank that hears nothing from another fails (default 300)",
    )


def check_timeout(args: argparse.Namespace) -> None:
    if not 0 < args.timeout < 1e7:
        raise ValueError(f"--timeout {args.timeout}: allowed are seconds above 0 and below 10 million")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write config, versions and rows there as one JSON object")


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
    if getattr(args, "weights", None) and not Path(args.weights).is_file():
        raise ValueError(f"--weights {args.weights}: no such file")
    output.check_file("--json", args.json)


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

    init_parallel(args.tp, args.timeout)
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    model = build_model(
        args.model,
        dtype=getattr(torch, dtype),
        token_dispatcher=args.token_dispatcher,
        extra_weights=weights,
    )
    yield model, read_tokenizer(args.model)
    destroy_parallel()


def read_tokenizer(model_dir: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {model_dir}: no tokenizer that transformers can load: {error}") from None
