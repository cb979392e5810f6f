# SPDX-License-Identifier: Apache-2.0
"""Runs a Megatron script, or module, as it is, with compressed communication.

    python -m megatron_comp.run --codec mxfp4 script.py its own arguments
    torchrun --nproc-per-node 8 -m megatron_comp.run --policy policy.yaml -m package.module its own arguments

Every GPTModel or MambaModel that the script builds is compressed as the policy says (see `megatron_comp.layers.hook`);
one line on standard error tells how many of its sums. A script that builds none ends in an error.
"""

import argparse
import runpy
import sys
from pathlib import Path

from .commands.options import min_bytes
from .commands.rank_policy import read_policy
from .notices import one_line
from .policy import CompressionPolicy


def main(argv: list[str] | None = None) -> int:
    """The script's own exit status; 1 if no model was compressed, 2 for arguments or a policy that are wrong."""
    own, script_arguments = _split(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(own)
    target = args.module or args.script
    try:
        if target is None:
            raise ValueError("give a script, or -m and a module")
        if args.policy and args.min_bytes is not None:
            raise ValueError("--min-bytes goes with --codec; a policy file has its own")
        if not args.module and not Path(target).is_file():
            raise ValueError(f"{target}: no such script")
        policy = read_policy(args.policy) if args.policy else _policy(args)
    except (ValueError, OSError) as error:
        print(f"megatron_comp.run: {one_line(error)}", file=sys.stderr)
        return 2

    from .layers.hook import Hook

    hook = Hook(policy)
    hook.install()
    hook.report_before_the_process_ends()
    sys.argv = [target, *script_arguments]
    try:
        if args.module:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(target).resolve().parent))  # as Python itself does
            runpy.run_path(target, run_name="__main__")
    except SystemExit as exit_:
        if exit_.code not in (None, 0):
            raise
    except KeyboardInterrupt:
        hook.report()
        raise
    if wrong := hook.report():
        print(f"megatron_comp.run: {target}: {wrong}", file=sys.stderr)
        return 1
    return 0


def _policy(args: argparse.Namespace) -> CompressionPolicy:
    return CompressionPolicy(codec=args.codec, min_bytes="auto" if args.min_bytes is None else args.min_bytes)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, up to and with the script or module, and those of the script."""
    end = 0
    while end < len(argv):
        word, end = argv[end], end + 1
        if word in ("--policy", "--codec", "--min-bytes"):
            end += 1
        elif word == "-m":
            return argv[: end + 1], argv[end + 1 :]
        elif not word.startswith("-"):
            break
    return argv[:end], argv[end:]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_comp.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--policy", metavar="FILE", help="a policy file")
    what.add_argument("--codec", metavar="C", help="a codec for every sum, with a policy's defaults")
    parser.add_argument(
        "--min-bytes",
        type=min_bytes,
        metavar="BYTES",
        help="of --codec: smaller messages stay uncompressed (default auto: those that are predicted to gain nothing)",
    )
    parser.add_argument("-m", dest="module", metavar="MODULE", help="run a module in place of a script")
    parser.add_argument("script", nargs="?", metavar="script.py ...", help="the script and its own arguments")
    return parser


if __name__ == "__main__":
    sys.exit(main())
