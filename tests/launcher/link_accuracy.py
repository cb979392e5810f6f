# SPDX-License-Identifier: Apache-2.0
"""Round trips and rates between two machines of a slow network (`launcher/network.py`), and what its relay
takes: for people, by hand.

Usage: python tests/launcher/link_accuracy.py [--rate 1gbit]... [--rtt 5ms]... [--seconds 2]

One TCP connection: 200 single bytes there and back, then as much as goes for some seconds, first out, then in. `steady`
leaves out the first half second, in which TCP finds its rate. Both ends go before other processes, as far as they may:
on a busy machine the time they wait for a processor would count as the link's.
"""

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_comp.launcher.network import Network  # noqa: E402

PINGS, BLOCK, RAMP = 200, 1 << 18, 0.5


def end(rank: int, seconds: float, folder: Path) -> None:
    """One of the two ends: rank 0 writes what it saw of the pings, the receiver what came."""
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    place, said = (os.environ["MASTER_ADDR"], 5000), {}
    server = socket.create_server(place) if rank == 0 else None
    for sender in (None, 0, 1):  # pings, out, in: a connection each
        with _connected(server, place) as peer:
            if sender is None:
                trips = sorted(_ping(peer, rank) for _ in range(PINGS))
                said["ping"] = [1e3 * trips[int(PINGS * share)] for share in (0.05, 0.5, 0.95)]
            elif rank == sender:
                stop = time.perf_counter() + seconds
                while time.perf_counter() < stop:
                    peer.sendall(bytes(BLOCK))
                peer.shutdown(socket.SHUT_WR)
                peer.recv(1)  # until the other end has all
            else:
                said["in" if sender else "out"] = _rates(peer)
    (folder / f"{rank}.json").write_text(json.dumps(said if rank == 0 else {"out": said["out"]}))


def _connected(server: socket.socket | None, place: tuple[str, int]) -> socket.socket:
    while True:
        with suppress(OSError):
            peer = server.accept()[0] if server else socket.create_connection(place)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return peer
        time.sleep(0.05)


def _ping(peer: socket.socket, rank: int) -> float:
    start = time.perf_counter()
    for step in (peer.send, peer.recv) if rank == 0 else (peer.recv, peer.send):
        step(b"x" if step == peer.send else 1)
    if rank == 0:
        time.sleep(0.002)
    return time.perf_counter() - start - 0.002 * (rank == 0)


def _rates(peer: socket.socket) -> list[float]:
    """Mbit/s of all that comes, and of what comes after the ramp."""
    marks = []
    while count := len(peer.recv(BLOCK)):
        marks.append((time.perf_counter(), count))
    first, last = marks[0][0], marks[-1][0]
    steady = [count for at, count in marks if at > first + RAMP]
    whole = sum(count for _, count in marks) / (last - first)
    return [8e-6 * whole, 8e-6 * sum(steady) / (last - first - RAMP)]


def measure(rate: str, rtt: str, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder, Network([1, 1], rate, rtt) as its:
        before = os.times()
        ends = [
            subprocess.Popen(
                [*its.enter(rank), sys.executable, "-S", __file__, "--end", str(rank), folder, str(seconds)],
                env={**os.environ, **its.environment},
            )
            for rank in (0, 1)
        ]
        if max(each.wait() for each in ends):
            raise SystemExit(f"{rate}, {rtt}: an end failed")
        of_ends = os.times()
        said = {k: v for rank in (0, 1) for k, v in json.loads(Path(folder, f"{rank}.json").read_text()).items()}
    relay = sum(os.times()[2:4]) - sum(of_ends[2:4])  # it ended with the network
    ping = ", ".join(f"{each:.2f}" for each in said["ping"])
    rates = "; ".join(f"{way} {said[way][0]:.0f}, steady {said[way][1]:.0f}" for way in ("out", "in"))
    wall = of_ends.elapsed - before.elapsed
    print(f"{rate}, {rtt}: ping {ping} ms; Mbit/s {rates}; relay {relay:.1f} s of processor time in {wall:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rate", action="append", metavar="R", help="of both links (default: 100mbit and 1gbit)")
    parser.add_argument("--rtt", action="append", metavar="T", help="round trip (default: 0, 200us, 1ms and 5ms)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of sending each way (default 2)")
    args = parser.parse_args()
    for rate, rtt in itertools.product(args.rate or ["100mbit", "1gbit"], args.rtt or ["0", "200us", "1ms", "5ms"]):
        measure(rate, rtt, args.seconds)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--end"]:
        end(int(sys.argv[2]), float(sys.argv[4]), Path(sys.argv[3]))
    else:
        main()
