# SPDX-License-Identifier: Apache-2.0
"""A slow network on one machine: a namespace for each machine of it, joined by a switch, with rate-limited links.

    machine 0: ranks 0, 1 [e0] --- tbf ---+
    machine 1: ranks 2, 3 [e0] --- tbf ---+ a bridge, or with latency `relay.py`, in a namespace of its own
    machine 2: ranks 4, 5 [e0] --- tbf ---+

Every link has its machine's rate in each direction, as ports of a switch have. Ranks of one machine meet by its
loopback device, as fast as the processor copies, and find one host name there. Namespaces have no name: one lives as
long as this process holds it open or a process runs in it. So they cannot collide with others, and the kernel removes
them, links included, however this process ends.
"""

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from . import relay

UNSHAPED = "unshaped"
INTERFACE = "e0"
# Any port will do where nobody else is.
PORT = 29500
MOST_RANKS = 200
LONGEST_RTT = 1.0

# The name of a network, for ranks that report what they were measured on: rates of all links, and `@` with its latency.
LINK = "MEGATRON_COMP_LINK"

_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_CLONE_NEWNET, _CLONE_NEWUTS = 0x40000000, 0x04000000


def machines_of(text: str) -> tuple[int, ...]:
    """Ranks of each machine: of `4` one in each of four, of `2x3` three in each of two, of `2+3` what it says.

    Raises ValueError for anything else.
    """
    each = re.fullmatch(r"(\d{1,4})x(\d{1,4})", text)
    if text.isascii() and text.isdecimal():
        machines = (1,) * int(text[:4])
    elif each:
        machines = (int(each[2]),) * int(each[1])
    elif re.fullmatch(r"\d{1,4}(\+\d{1,4})+", text):
        machines = tuple(map(int, text.split("+")))
    else:
        raise ValueError(f"{text!r} are no machines: 4 are four of one rank, 2x3 two of three ranks, 2+3 unequal ones")
    return machines


def seconds_of(text: str) -> float:
    """Of `1ms`, `200us`, `0`. Raises ValueError for anything else, and for more than a second."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s)", text)
    seconds = 0.0 if text == "0" else float(found[1]) * _SECONDS[found[2]] if found else -1.0
    if not 0 <= seconds <= LONGEST_RTT:
        raise ValueError(f"{text!r} is no round trip: allowed are 0 to {LONGEST_RTT:g}s, as in 200us or 1ms")
    return seconds


def slowest_rate(link: str) -> float | None:
    """Bits per second of the slowest link of a network, by its name; None where all are unshaped."""
    rates = [bits_per_second(rate) for rate in link.partition("@")[0].split(",")]
    return min((rate for rate in rates if rate is not None), default=None)


def bits_per_second(rate: str) -> float | None:
    """Of `100mbit`, `2.5gbit`, ...; None for `unshaped`. Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate)
    if rate == UNSHAPED:
        return None
    if not found or not 1e5 <= (bits := float(found[1]) * _UNITS[found[2]]) <= 1e12:
        raise ValueError(
            f"{rate!r} is no rate of a link: allowed are 100kbit to 1000gbit, as in 100mbit, or {UNSHAPED}"
        )
    return bits


def burst_bytes(rate: float) -> int:
    """What a link of that many bits per second lets through at once, after it has been idle.

    tbf refills its bucket by a timer: with 64 KB a link of 1 Gbit/s gave 200 Mbit/s, with 256 KB all of it; so from
    there on it holds what the link carries in 2 ms.
    """
    return max(256 * 1024, int(rate / 8 * 0.002))


class Network:
    """A context in which the namespaces stand, and at whose end all that still runs in them is killed."""

    def __init__(self, machines: Sequence[int], rates: str, rtt: str = "0") -> None:
        """machines: how many ranks each has. rates: of every machine's link, as in `100mbit`, or one for each, as in
        `100mbit,1gbit`. rtt: of a small packet between two machines and back, as in `1ms`, beyond what copying takes.

        Raises ValueError for what is no rate or round trip, for other numbers of rates than machines, for a machine
        without ranks, and for more ranks than allowed.
        """
        machines, ranks = tuple(machines), sum(machines)
        if not 1 <= ranks <= MOST_RANKS or min(machines) < 1:
            raise ValueError(f"a network of {ranks} ranks: allowed are 1 to {MOST_RANKS}, and one or more to a machine")
        names = rates.split(",")
        if len(names) not in (1, len(machines)):
            raise ValueError(f"{len(names)} rates for {len(machines)} machines: give one, or one for each")
        self._rates = [bits_per_second(name) for name in names] * (len(machines) // len(names))
        self._rtt = seconds_of(rtt)
        self._namespaces: list[_Namespace] = []
        self._stack = ExitStack()
        self._machine_of = [machine for machine, count in enumerate(machines) for _ in range(count)]
        self.machines, self.ranks = machines, ranks
        self.environment = {
            "MASTER_ADDR": _address(0),
            "MASTER_PORT": str(PORT),
            "TORCHELASTIC_USE_AGENT_STORE": "False",  # rank 0 opens the store
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "NCCL_SOCKET_IFNAME": INTERFACE,
            # torch warns of every peer whose address has no name, and here none has.
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
            LINK: f"{rates}@{rtt}" if self._rtt else rates,
        }

    def __enter__(self) -> "Network":
        """Raises ValueError, in one line, if this machine or user cannot make such a network."""
        for tool in ("ip", "tc", "nsenter", "setpriv"):
            if shutil.which(tool) is None:
                raise ValueError(
                    f"a network with links of a given rate needs the command {tool} (iproute2, util-linux)"
                )
        try:
            names = [*(f"machine{number}" for number in range(len(self.machines))), "switch"]
            self._namespaces = [self._open_namespace(name) for name in names]
            self._join()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        for _ in range(100):
            if not (inside := list(self._processes())):
                break
            for pid in inside:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        self._stack.close()

    def enter(self, rank: int) -> list[str]:
        """What to put before a command so that it runs as that rank, in the same process, and ends with this one."""
        return ["setpriv", "--pdeathsig", "KILL", "--", *self._inside(self._namespaces[self._machine_of[rank]])]

    def _open_namespace(self, host: str) -> "_Namespace":
        """A new one, whose host has that name. A thread moves into it, opens it and ends; this process stays put."""
        opened: list[_Namespace | OSError] = []

        def work() -> None:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(_CLONE_NEWNET | _CLONE_NEWUTS):
                error = ctypes.get_errno()
                opened.append(OSError(error, os.strerror(error)))
                return
            socket.sethostname(host)
            opened.append(
                _Namespace(*(os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY) for kind in ("net", "uts")))
            )

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        (namespace,) = opened
        if isinstance(namespace, OSError):
            raise ValueError(
                f"a network with links of a given rate needs root: no namespace can be made here: {namespace}"
            )
        for descriptor in (namespace.net, namespace.uts):
            self._stack.callback(os.close, descriptor)
        return namespace

    def _join(self) -> None:
        *machines, switch = self._namespaces
        if not self._rtt:
            self._run(switch, "ip link add br0 type bridge")
            self._run(switch, "ip link set br0 up")
        ports = [f"p{machine}" for machine in range(len(machines))]
        for machine, (namespace, port, rate) in enumerate(zip(machines, ports, self._rates, strict=True)):
            self._run(namespace, "ip link set lo up")
            self._run(namespace, f"ip link add {INTERFACE} type veth peer name {port} netns {_path(switch.net)}")
            self._run(switch, f"ip link set {port} {'up' if self._rtt else 'master br0 up'}")
            self._run(namespace, f"ip address add {_address(machine)}/24 dev {INTERFACE}")
            self._run(namespace, f"ip link set {INTERFACE} up")
            if rate is not None:
                limit = f"root tbf rate {rate:.0f}bit burst {burst_bytes(rate)}b latency 20ms"
                self._run(namespace, f"tc qdisc add dev {INTERFACE} {limit}")
                self._run(switch, f"tc qdisc add dev {port} {limit}")
        if self._rtt:
            self._start_relay(switch, ports)

    def _start_relay(self, switch: "_Namespace", ports: list[str]) -> None:
        command = [*self._inside(switch), sys.executable, "-I", relay.__file__, str(self._rtt / 2), *ports]
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._stack.callback(_end, process)
        if not process.stdout.readline():
            said = process.communicate()[1].splitlines()[-1:]
            raise ValueError(f"this machine cannot make such a network: its latency: {' '.join(said)}")

    def _run(self, namespace: "_Namespace", command: str) -> None:
        done = subprocess.run([*self._inside(namespace), *command.split()], capture_output=True, text=True)
        if done.returncode:
            said = " ".join(done.stderr.split())
            raise ValueError(f"this machine cannot make such a network: {command.split(' netns ')[0]}: {said}")

    def _inside(self, namespace: "_Namespace") -> list[str]:
        return ["nsenter", f"--net={_path(namespace.net)}", f"--uts={_path(namespace.uts)}", "--"]

    def _processes(self) -> Iterator[int]:
        """All that run in one of the namespaces, children of ranks included."""
        ours = {os.fstat(namespace.net).st_ino for namespace in self._namespaces}
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            try:
                if os.stat(f"/proc/{pid}/ns/net").st_ino in ours:
                    yield int(pid)
            except OSError:  # it has ended
                continue


def missing() -> str | None:
    """Why such a network cannot be made here, or None."""
    try:
        with Network([1], "100mbit"):
            return None
    except ValueError as error:
        return str(error)


@dataclass(frozen=True)
class _Namespace:
    """File descriptors: one of the network's, one of the host name's."""

    net: int
    uts: int


def _path(descriptor: int) -> str:
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def _address(machine: int) -> str:
    """In the range that RFC 2544 sets apart for benchmarks of networks."""
    return f"198.18.0.{machine + 1}"
