"""`megatron-comp bench`: how fast it is here, beside what it is compared to, in one run."""

import argparse

from . import codec

BENCHES = {
    "codec": (codec, "encode, decode and sum on one device, beside a plain copy of the tensor"),
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


def run(args: argparse.Namespace) -> None:
    BENCHES[args.bench][0].run(args)
