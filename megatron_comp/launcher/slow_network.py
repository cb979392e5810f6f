# SPDX-License-Identifier: Apache-2.0
"""What launch/slow_network.sh runs: a command, once for each rank, on a slow network of this machine."""

import sys

from . import ranks
from .network import Network, machines_of

USAGE = "usage: slow_network.sh MACHINES RATE [--rtt TIME] -- COMMAND [ARGUMENT...], as in: 2x4 100mbit -- python a.py"


def main(argv: list[str]) -> int:
    """0, or the status of the first rank that failed, or 2 after one clear line on standard error."""
    try:
        before, command = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else ([], [])
        latency = ["--rtt", "0"] if len(before) == 2 else before[2:]
        if len(before) < 2 or len(latency) != 2 or latency[0] != "--rtt" or not command:
            raise ValueError(USAGE)
        its = Network(machines_of(before[0]), before[1], latency[1])
        return ranks.start(its.ranks, command, its)
    except (ValueError, OSError) as error:
        print(f"slow_network: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
