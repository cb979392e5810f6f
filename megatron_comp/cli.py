# SPDX-License-Identifier: Apache-2.0
"""The command `megatron-comp`."""

import argparse
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import ModuleType

from .commands.subcommands import Subcommands
from .launcher import ranks
from .notices import Notice, one_line
from .version import __version__

LONGEST_WAIT = 60  # seconds, for ranks that are to be told of an error

SUBCOMMANDS = Subcommands(
    "subcommand",
    {
        "generate": ("generate", "Continue a prompt; show time to first token, decode rate and bytes received."),
        "evaluate": ("evaluate", "Measure perplexity, KL divergence and bytes on a text, one row per codec."),
        "search": ("search", "Find the policy of fewest bits that keeps a bound on KL or perplexity."),
        "report": ("report", "Put on one page what other commands measured, with intervals and figures."),
        "drop": ("drop", "Leave out the sum after attention: in which blocks, and how to make up for it."),
        "predictor": ("predictor", "Fit predictors, so that sums need fewer bits."),
        "bench": ("bench", "Measure speed, beside an uncompressed baseline of the same run."),
        "plan": ("plan", "Predict time to first token on a GPU and link, and whether to compress; needs no GPU."),
        "calibrate": (
            "calibrate",
            "Measure this group's link and codecs, and from which message size compression pays.",
        ),
        "convert": ("convert", "Write a Hugging Face checkpoint as a distributed checkpoint of Megatron."),
    },
)

EPILOG = """\
A codec is a preset (mxfp4, mxfp6, mxfp8, nvfp4, ...) or element:block:scale[:option...], for instance
int4:32:fp16:hadamard; two of them joined by '>' serve the two steps of two_step; none is the stock collective.
Without WORLD_SIZE in the environment the ranks are started on this machine; under torchrun or srun they are joined.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; 0, or non-zero after one clear line on standard error."""
    argv = sys.argv[1:] if argv is None else argv
    _replace_what_cannot_be_written()
    args = _parser().parse_args(argv)
    return carry_out(lambda: SUBCOMMANDS.chosen(args), args, "megatron_comp.cli", argv)


def carry_out(load: Callable[[], ModuleType], args: argparse.Namespace, program: str, argv: list[str]) -> int:
    """Runs a command in this process, or `python -m program argv` on the ranks that it wants; returns as `main` does.

    load: gives the command, which has `check(args)` and `run(args)`; one that starts its ranks in a way of its own also
    `start(args, argv)`. Commands import torch: what can be checked without is checked before.
    """
    from .commands import preflight  # not for `--version` and `--help`, which are to answer at once

    is_a_rank = False
    try:
        own_ranks = hasattr(args, "link")  # a bench that starts its ranks once per link
        if own_ranks or hasattr(args, "tp"):
            preflight.check_environment(args)
        is_a_rank = ranks.joined()
        if is_a_rank or not (hasattr(args, "tp") or own_ranks):  # else a command of one process
            with _own_warnings():
                load().run(args)
            return 0
        preflight.check_inputs(args)
        command = load()
        command.check(args)
        if hasattr(command, "start"):
            return command.start(args, argv)
        return ranks.start(preflight.ranks_of(args), [sys.executable, "-m", program, *argv])
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("MEGATRON_COMP_TRACEBACK"):
            raise
        ranks.report(one_line(error))
        if is_a_rank and not ranks.started_here():
            _tell_others(error, args)
        return 2 if isinstance(error, (ValueError, OSError)) else 1


def _tell_others(error: Exception, args: argparse.Namespace) -> None:
    """Meets the other ranks, which else would wait for this one; all end then. A launcher of ours ends them itself."""
    with suppress(Exception):  # the others know by then, or are not there
        import torch.distributed as dist

        from .wire.together import join_job

        if hasattr(args, "timeout") and not dist.is_initialized():
            join_job(timedelta(seconds=min(args.timeout, LONGEST_WAIT)), error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-comp",
        description="Tensor-parallel LLM inference on Megatron-Core with compressed communication.",
        epilog=EPILOG + "MEGATRON_COMP_TRACEBACK=1 shows the traceback of an error.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megatron_comp {__version__}")
    SUBCOMMANDS.add_to(parser, EPILOG)
    return parser


def _replace_what_cannot_be_written() -> None:
    """Lets standard output write `?` for characters that its encoding lacks, instead of failing after the work.

    In the place of a closed output or error stream stands the null device.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the command
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process runs
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


@contextmanager
def _own_warnings():
    """Shows those of this package, each once, on the rank that speaks for all.

    Megatron and transformers warn of optional packages that inference here does not use, lm_eval of tasks that leave
    a default as it is.
    """
    for library in ("megatron", "transformers", "torchao", "lm_eval"):
        logging.getLogger(library).setLevel(logging.ERROR)
    logger = logging.getLogger("megatron_comp")
    handler = _Once() if os.environ.get("RANK", "0") == "0" else logging.NullHandler()
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore")
            warnings.filterwarnings("always", category=Notice)
            warnings.showwarning = lambda message, *_, **__: logger.warning("%s", message)
            yield
    finally:
        logger.removeHandler(handler)


class _Once(logging.Handler):
    """Writes a line of standard error for each warning that it has not written yet."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split()).removeprefix("megatron_comp: ")
        if text not in self._seen:
            self._seen.add(text)
            print(f"megatron-comp: warning: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
