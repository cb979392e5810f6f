"""What launch/slow_network.sh runs: a command, once a rank, on a slow network of this machine."""

import sys

from . import ranks

USAGE = "usage: slow_network.sh N RATE -- COMMAND [ARGUMENT...], as in: slow_network.sh 2 100mbit -- python script.py"


def main(argv: list[str]) -> int:
    """0, or the status of the first rank that failed, or 2 after one clear line on standard error."""
    try:
        count, rate, dashes, *command = argv if len(argv) > 3 else [""] * 4
        if not (count.isascii() and count.isdecimal() and dashes == "--"):
            raise ValueError(USAGE)
        return ranks.start(int(count), command, link=rate)
    except (ValueError, OSError) as error:
        print(f"slow_network: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
