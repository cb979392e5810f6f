"""A slow network on one machine: a network namespace for each rank, joined by a bridge, with rate-limited links.

    rank 0 [e0] --- tbf ---+
    rank 1 [e0] --- tbf ---+ bridge, in a namespace of its own
    rank 2 [e0] --- tbf ---+

Every link has the rate in each direction, as ports of a switch have. Namespaces have no name: one lives as long as this
process holds it open or a process runs in it. So they cannot collide with others, and the kernel removes them, links
included, however this process ends.
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

UNSHAPED = "unshaped"
INTERFACE = "e0"
# Any port will do where nobody else is.
PORT = 29500
MOST_RANKS = 200

# The name of a link, for ranks that report what they were measured on.
LINK = "MEGATRON_COMP_LINK"

_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_CLONE_NEWNET = 0x40000000


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
    """What a link of that many bits a second lets through at once, after it has been idle.

    tbf refills its bucket by a timer: with 64 KB a link of 1 Gbit/s gave 200 Mbit/s, with 256 KB all of it; so from
    there on it holds what the link carries in 2 ms.
    """
    return max(256 * 1024, int(rate / 8 * 0.002))


class Network:
    """A context in which the namespaces stand, and at whose end all that still runs in them is killed."""

    def __init__(self, ranks: int, rate: str) -> None:
        """Raises ValueError for what is no rate, or more ranks than addresses."""
        if not 1 <= ranks <= MOST_RANKS:
            raise ValueError(f"a network of {ranks} ranks: allowed are 1 to {MOST_RANKS}")
        self._rate = bits_per_second(rate)
        self._namespaces: list[int] = []
        self._stack = ExitStack()
        self.ranks = ranks
        self.environment = {
            "MASTER_ADDR": _address(0),
            "MASTER_PORT": str(PORT),
            "TORCHELASTIC_USE_AGENT_STORE": "False",  # rank 0 opens the store
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "NCCL_SOCKET_IFNAME": INTERFACE,
            # torch warns of every peer whose address has no name, and here none has.
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
            LINK: rate,
        }

    def __enter__(self) -> "Network":
        """Raises ValueError, in one line, if this machine or user cannot make such a network."""
        for tool in ("ip", "tc", "nsenter", "setpriv"):
            if shutil.which(tool) is None:
                raise ValueError(
                    f"a network with links of a given rate needs the command {tool} (iproute2, util-linux)"
                )
        try:
            self._namespaces = [self._open_namespace() for _ in range(self.ranks + 1)]
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
        return ["setpriv", "--pdeathsig", "KILL", "--", *self._inside(self._namespaces[rank])]

    def _open_namespace(self) -> int:
        """A file descriptor of a new namespace. A thread moves into it, opens it and ends; this process stays put."""
        opened: list[int | OSError] = []

        def work() -> None:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(_CLONE_NEWNET):
                error = ctypes.get_errno()
                opened.append(OSError(error, os.strerror(error)))
            else:
                opened.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        (namespace,) = opened
        if isinstance(namespace, OSError):
            raise ValueError(
                f"a network with links of a given rate needs root: no namespace can be made here: {namespace}"
            )
        self._stack.callback(os.close, namespace)
        return namespace

    def _join(self) -> None:
        *ranks, switch = self._namespaces
        self._run(switch, "ip link add br0 type bridge")
        self._run(switch, "ip link set br0 up")
        for rank, namespace in enumerate(ranks):
            port = f"p{rank}"
            self._run(namespace, "ip link set lo up")
            self._run(namespace, f"ip link add {INTERFACE} type veth peer name {port} netns {self._path(switch)}")
            self._run(switch, f"ip link set {port} master br0 up")
            self._run(namespace, f"ip address add {_address(rank)}/24 dev {INTERFACE}")
            self._run(namespace, f"ip link set {INTERFACE} up")
            if self._rate is not None:
                limit = f"root tbf rate {self._rate:.0f}bit burst {burst_bytes(self._rate)}b latency 20ms"
                self._run(namespace, f"tc qdisc add dev {INTERFACE} {limit}")
                self._run(switch, f"tc qdisc add dev {port} {limit}")

    def _run(self, namespace: int, command: str) -> None:
        done = subprocess.run([*self._inside(namespace), *command.split()], capture_output=True, text=True)
        if done.returncode:
            said = " ".join(done.stderr.split())
            raise ValueError(f"this machine cannot make such a network: {command.split(' netns ')[0]}: {said}")

    def _inside(self, namespace: int) -> list[str]:
        return ["nsenter", f"--net={self._path(namespace)}", "--"]

    def _path(self, namespace: int) -> str:
        return f"/proc/{os.getpid()}/fd/{namespace}"

    def _processes(self) -> Iterator[int]:
        """All that run in one of the namespaces, children of ranks included."""
        ours = {os.fstat(namespace).st_ino for namespace in self._namespaces}
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            try:
                if os.stat(f"/proc/{pid}/ns/net").st_ino in ours:
                    yield int(pid)
            except OSError:  # it has ended
                continue


def missing() -> str | None:
    """Why such a network cannot be made here, or None."""
    try:
        with Network(1, "100mbit"):
            return None
    except ValueError as error:
        return str(error)


def _address(rank: int) -> str:
    """In the range that RFC 2544 sets apart for benchmarks of networks."""
    return f"198.18.0.{rank + 1}"
