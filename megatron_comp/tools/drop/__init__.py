"""`megatron-comp drop`: blocks without the sum after attention: which ones, and how to make up for it."""

import argparse

from . import curve, distill, group, sensitivity

STEPS = {
    "sensitivity": (sensitivity, "what each block's dropped sum costs on a text; ranks and classes of blocks"),
    "distill": (distill, "weights with which chosen blocks give what they gave before"),
    "group": (group, "weights with heads assigned to ranks anew, to start distillation of extreme blocks from"),
    "curve": (curve, "quality and bytes against the share of dropped sums"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = None  # each step has its own
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    for name, (module, help_) in STEPS.items():
        step = steps.add_parser(
            name,
            help=help_,
            description=module.__doc__.partition(": ")[2],
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(step)


def check(args: argparse.Namespace) -> None:
    STEPS[args.step][0].check(args)


def run(args: argparse.Namespace) -> None:
    STEPS[args.step][0].run(args)
