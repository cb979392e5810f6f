"""`megatron-comp bench`: how fast it is here, beside what it is compared to, in one run."""

import argparse

from . import codec, collective, ttft

BENCHES = {
    "codec": (codec, "encode, decode and sum on one device, beside a plain copy of the tensor"),
    "collective": (
        collective,
        "the sum over ranks, stock, in 16 bits and compressed, as they are or on links of a rate",
    ),
    "ttft": (ttft, "time to first token of a model, stock and compressed, as they are or on links of a rate"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = None  # each bench has its own
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    for name, (module, help_) in BENCHES.items():
        bench = benches.add_parser(
            name,
            help=help_,
            description=module.__doc__.partition(": ")[2],
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(bench)


def check(args: argparse.Namespace) -> None:
    BENCHES[args.bench][0].check(args)


def start(args: argparse.Namespace, argv: list[str]) -> int:
    """Of a bench with `--link`, where no ranks were started yet: runs `megatron-comp argv` on ranks of its own."""
    return BENCHES[args.bench][0].start(args, argv)


def run(args: argparse.Namespace) -> None:
    BENCHES[args.bench][0].run(args)
