# SPDX-License-Identifier: Apache-2.0
"""Runs a function on several gloo ranks, each in a process of its own, inside an ordinary pytest test.

    def work(rank, world_size, scale):          # at the top level of the test's file
        x = torch.full((4,), float(rank)) * scale
        torch.distributed.all_reduce(x)
        return x

    def test_sum():
        for x in run_ranks(work, 3, 2.0): ...

Processes are forked from a server that has imported the heavy modules already, so a start costs tenths of a second.
"""

import importlib
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import socket
import sys
import threading
import time
import traceback
import types
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path

import torch
import torch.distributed as dist

SUPPORT = Path(__file__).resolve().parent

# What ranks import, tests' files and Megatron scripts included: what is left out costs its time again in every rank.
# Modules that are missing are skipped by the server, not an error.
PRELOAD = [
    "pytest",
    "hypothesis",
    "torch",
    "torch.distributed",
    "megatron.core.dist_checkpointing",
    "megatron.core.inference.engines.static_engine",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.gpt.gpt_layer_specs",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "safetensors.torch",
    "megatron_comp.cli",
    "megatron_comp.inference.checkpoint",
    "megatron_comp.inference.generate",
    "megatron_comp.layers.hook",
]


def run_ranks(fn, world_size, *args, timeout=120, init=True, may_die=()):
    """Runs `fn(rank, world_size, *args)` in `world_size` processes and returns their results by rank.

    fn: a function at the top level of a module; its arguments and results are pickled (tensors travel by value).
    timeout: seconds for the whole call, and the process group's own timeout.
    init: a gloo process group stands before `fn` is called. Without it `fn` may start one itself with `env://`:
        RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set in either case.
    may_die: ranks that may end without a result (killed by the test); theirs is None.

    Raises AssertionError with the traceback of the first rank that failed, or when the time is over.
    No process outlives the call.
    """
    if fn.__qualname__ != fn.__name__:
        raise ValueError(f"{fn.__qualname__} is not at the top level of its module, so other processes cannot find it")
    context = forkserver()
    # The store's port is chosen by the kernel and held from here on: no other process can take it in between.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    target = (fn.__module__, inspect.getfile(fn), fn.__name__)
    # One argument blob, pickled by value, since multiprocessing would share tensors through file descriptors.
    payload = pickle.dumps(args)
    processes, pipes = [], []
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            environment = _environment(rank, world_size, store.port)
            process = context.Process(target=_rank_main, args=(theirs, environment, target, payload, timeout, init))
            process.daemon = True
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        return _collect(processes, pipes, time.monotonic() + timeout, timeout, may_die)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        for pipe in pipes:
            pipe.close()


def forkserver():
    """The multiprocessing context whose processes are forked from the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _environment(rank, world_size, port):
    environment = dict(os.environ)
    environment.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # env:// joins the store that stands instead of opening one
    )
    if any(name == "lo" for _, name in socket.if_nameindex()):
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name that does not resolve is no reason to fail
    return environment


def _collect(processes, pipes, deadline, timeout, may_die):
    results = [None] * len(pipes)
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"ranks {sorted(waiting.values())} gave no answer within {timeout} s")
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join(5)
                if rank in may_die:
                    continue
                raise AssertionError(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
            if not ok:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return results


def _rank_main(pipe, environment, target, payload, timeout, init):
    threading.Thread(target=exit_with_parent, daemon=True).start()
    os.environ.update(environment)
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    try:
        torch.set_num_threads(1)
        fn = getattr(_load(*target[:2]), target[2])
        if init:
            dist.init_process_group("gloo", init_method="env://", timeout=timedelta(seconds=timeout))
        answer = pickle.dumps((True, fn(rank, world_size, *pickle.loads(payload))))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send_bytes(answer)
    pipe.close()
    # Until all have answered and are killed: a rank that left now would cut off one that is still at it.
    threading.Event().wait()


def _load(name, file):
    """The module of a test function. Test files lie in no package, so they are read by path, under pytest's name."""
    if name in sys.modules:
        return sys.modules[name]
    if SUPPORT.parent not in Path(file).resolve().parents:
        return importlib.import_module(name)
    if str(SUPPORT) not in sys.path:
        sys.path.insert(0, str(SUPPORT))
    parts = name.split(".")
    for depth in range(1, len(parts)):  # pickle imports the parents of a dotted name
        parent = ".".join(parts[:depth])
        sys.modules.setdefault(parent, types.ModuleType(parent))
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def exit_with_parent():
    """Ends this rank when the process that asked for it is gone, also after a SIGKILL."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
