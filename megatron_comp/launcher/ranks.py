# SPDX-License-Identifier: Apache-2.0
"""Starts a command's ranks on this machine, so that nobody needs torchrun to try it; and ends them, however it ends."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

from .network import Network

# How long the other ranks have, once one has failed, to notice and to say what they saw.
GRACE_SECONDS = 15.0
MOST_RANKS = 1024  # that this machine is asked to start

# What srun numbers its tasks by: over all nodes, and on each.
_SRUN = ("SLURM_PROCID", "SLURM_LOCALID")

# Variables that `start` hands to its ranks: its own process, and the folder for what they report.
_STARTER = "MEGATRON_COMP_STARTER"
_ERRORS = "MEGATRON_COMP_ERRORS"


def joined() -> bool:
    """Whether a launcher started this process as a rank: torchrun, `start`, or srun with several tasks.

    A rank of torchrun or `start` ends with the process that started it, however that ends. To one of srun, which gives
    it a number but no ranks, this gives them.

    Raises ValueError under srun with several tasks if nobody has said where they meet, and for variables of srun that
    are left over from something else.
    """
    if "WORLD_SIZE" in os.environ:
        if starter := os.environ.get(_STARTER):
            _die_with(int(starter))
        elif "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() > 1:
            _die_with(os.getppid())
        return True
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    numbers = [tasks] if tasks == "1" else [tasks, *(os.environ.get(name, "") for name in _SRUN)]
    if not all(number.isascii() and number.isdecimal() for number in numbers) or tasks == "0":
        raise ValueError(
            f"the environment says SLURM_STEP_NUM_TASKS={tasks!r}, but srun has not numbered this process by "
            f"{' and '.join(_SRUN)}: `unset SLURM_STEP_NUM_TASKS` to start without srun"
        )
    if tasks == "1":
        return False
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise ValueError(
            f"srun started {tasks} tasks that do not know where to meet: set MASTER_ADDR to the address of the first "
            "task's node and MASTER_PORT to a port that is free there, or run torchrun in one task a node"
        )
    os.environ.update(RANK=os.environ["SLURM_PROCID"], LOCAL_RANK=os.environ["SLURM_LOCALID"], WORLD_SIZE=tasks)
    return True


def started_here() -> bool:
    """Whether `start` started this process, which ends all ranks when one has failed."""
    return _STARTER in os.environ


def start(ranks: int, command: list[str], network: Network | None = None, **more: str) -> int:
    """Runs `command` once per rank, in the environment that torchrun would give; 0, or the first failing rank's status.

    network: of so many ranks, which stands while they run; None: they meet on this machine as it is. more: further
    variables of their environment. Rank 0's output is the command's.
    What the rank reported that failed first is printed, once for all that said the same; of the others, which lost it,
    one line.

    Raises ValueError for a network that cannot be made here, and for more ranks than any machine runs.
    """
    if ranks > MOST_RANKS:
        raise ValueError(
            f"{ranks} ranks: at most {MOST_RANKS} are started on one machine; torchrun starts them on several"
        )
    processes: list[subprocess.Popen] = []
    previous = {s: signal.signal(s, lambda s, _: sys.exit(128 + s)) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with tempfile.TemporaryDirectory(prefix="megatron-comp-") as errors, _meeting(network) as (place, enter):
            try:
                for rank in range(ranks):
                    environment = _environment(rank, ranks, errors) | place | more
                    processes.append(subprocess.Popen([*enter(rank), *command], env=environment))
                status, lasted = _wait(processes)
            finally:
                for process in processes:
                    process.kill()
                for process in processes:
                    process.wait()
            if status:
                _print_errors(processes, Path(errors), lasted)
            return status
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def report(message: str) -> None:
    """Says why this rank fails: to `start`, or where torchrun or srun started it, on its own standard error."""
    rank = os.environ.get("RANK", "0")
    if folder := os.environ.get(_ERRORS):
        Path(folder, rank).write_text(message)
    else:
        where = f" on rank {rank}" if "WORLD_SIZE" in os.environ else ""
        print(f"megatron-comp: error{where}: {message}", file=sys.stderr, flush=True)


@contextmanager
def alone(path: str | None) -> Iterator[None]:
    """Every rank calls this, and rank 0 keeps other commands from work on `path`, if there is one.

    Raises files.InUse, on every rank, if another process is at work on it.
    """
    import torch.distributed as dist  # a second, like the rest of torch

    from .. import files

    with ExitStack() as held:
        problem: list[Exception | None] = [None]
        if path is not None and dist.get_rank() == 0:
            try:
                held.enter_context(files.locked(path))
            except (files.InUse, OSError) as error:
                problem[0] = error
        dist.broadcast_object_list(problem, 0)
        if problem[0] is not None:
            raise problem[0]
        yield


def _die_with(starter: int) -> None:
    """Asks Linux to kill this process when its parent, the one that started it, ends, however it ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != starter:  # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def _meeting(network: Network | None) -> Iterator[tuple[dict[str, str], Callable[[int], list[str]]]]:
    """Where the ranks meet: variables of their environment, and what goes before the command of each."""
    if network is not None:
        with network:
            yield network.environment, network.enter
        return
    # This process holds the store, on a port that the kernel chose: no other process can take it in between.
    from torch.distributed import TCPStore  # takes a second to import: not for `--version` and `--help`

    # Whoever reaches the store decides what ranks unpickle. By itself it would listen on every network of this machine.
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        store = TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(minutes=5),
            master_listen_fd=server.detach(),
        )
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # env:// joins the store that stands instead of opening one
    }
    if "GLOO_SOCKET_IFNAME" not in os.environ and "lo" in dict(socket.if_nameindex()).values():
        place["GLOO_SOCKET_IFNAME"] = "lo"  # a host name that does not resolve is no reason to fail
    yield place, lambda _rank: []


def _environment(rank: int, ranks: int, errors: str) -> dict[str, str]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        _STARTER: str(os.getpid()),
        _ERRORS: errors,
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    return environment


def _wait(processes: list[subprocess.Popen]) -> tuple[int, list[float]]:
    """Waits for all; after a failure only as long as the grace lasts. The first failing status, or 0; and when each
    process was last seen alive."""
    status, deadline, lasted, alive = 0, None, [time.time()] * len(processes), True
    while alive:
        now = time.time()
        alive = [rank for rank, process in enumerate(processes) if process.poll() is None]
        for rank in alive:
            lasted[rank] = now
        if deadline is None and (failed := [p.returncode for p in processes if p.poll()]):
            status, deadline = failed[0], time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    status = status or next((process.returncode for process in processes if process.returncode), 0)
    return 1 if status < 0 else status, lasted


def _print_errors(processes: list[subprocess.Popen], folder: Path, lasted: list[float]) -> None:
    """lasted: when each process was last seen alive, which is when one failed that said nothing."""
    failures: list[tuple[float, str, int]] = []  # when, what, and which rank
    for rank, process in enumerate(processes):
        file = folder / str(rank)
        if file.exists():
            failures.append((file.stat().st_mtime, file.read_text(), rank))
        elif process.returncode:
            failures.append((lasted[rank], _ending(process.returncode), rank))
    failures.sort()
    first = failures[0][1]
    alike, others = ([failure for failure in failures if (failure[1] == first) is same] for same in (True, False))
    for what, group in (("error", alike), ("then an error", others)):
        if group:
            ranks = ", ".join(map(str, sorted(rank for *_, rank in group)))
            where = "" if len(group) == len(processes) else f" on rank {ranks}"
            print(f"megatron-comp: {what}{where}: {group[0][1]}", file=sys.stderr, flush=True)


def _ending(status: int) -> str:
    """Of a process that reported nothing."""
    if status == -signal.SIGKILL:
        return "was killed, or did not end after another rank had failed"
    if status < 0:
        return f"was ended by signal {-status} ({signal.strsignal(-status)})"
    return f"ended with status {status} and said nothing"
