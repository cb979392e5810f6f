# SPDX-License-Identifier: Apache-2.0
"""Runs `python ...` command lines in processes forked from the server of `ranks`, which has imported all that is heavy.

    done = run([sys.executable, "-m", "megatron_comp.cli", "generate", ...], environment)   # a CompletedProcess

Arguments, environment, folder, standard output and error, and exit status are those of a process of its own, and so are
the processes that `megatron_comp.launcher.ranks.start` starts in it. What this cannot show is that a fresh process
imports what it needs: of every entry point some test starts a process of its own.
"""

import atexit
import contextlib
import importlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import weakref
from pathlib import Path

import torch
from ranks import exit_with_parent, forkserver

# Runs a command on so many ranks, as torchrun would.
_RANKS = "import sys; from megatron_comp.launcher import ranks; sys.exit(ranks.start(int(sys.argv[1]), sys.argv[2:]))"


def on_ranks(count, argv):
    """The command line that runs `argv` once per rank and ends with the status of the first that fails."""
    return [sys.executable, "-c", _RANKS, str(count), *argv]


def run(argv, environment, cwd=None, timeout=240):
    """The finished `subprocess.CompletedProcess` of a command line of this Python.

    argv: `[sys.executable, "-m", module, ...]`, `[sys.executable, "-c", code, ...]` or `[sys.executable, file, ...]`.
    environment: all of its environment variables.

    Raises subprocess.TimeoutExpired. No process outlives the call.
    """
    argv = list(map(str, argv))
    if argv[0] != sys.executable:
        raise ValueError(f"{argv[0]} is not this Python, {sys.executable}")
    with tempfile.TemporaryDirectory(prefix="command-") as folder:
        out, errors = Path(folder, "out"), Path(folder, "errors")
        args = (argv, environment, cwd or os.getcwd(), str(out), str(errors))
        process = forkserver().Process(target=_main, args=args)
        process.start()
        try:
            process.join(timeout)
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(argv, timeout, out.read_bytes(), errors.read_bytes())
            return subprocess.CompletedProcess(argv, process.exitcode, out.read_text(), errors.read_text())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it leads a group, in which its ranks are
            process.kill()
            process.join()


def _main(argv, environment, cwd, out, errors):
    os.setpgid(0, 0)
    threading.Thread(target=exit_with_parent, daemon=True).start()
    for descriptor, path in ((1, out), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(cwd)
    starter = importlib.import_module("megatron_comp.launcher.ranks")
    starter.subprocess = types.SimpleNamespace(Popen=_popen)
    os._exit(_become(argv, environment))


def _popen(argv, env):
    """In place of subprocess.Popen: a fork for this Python, a process for anything else."""
    return Forked(argv, env) if argv[0] == sys.executable else subprocess.Popen(argv, env=env)


class Forked:
    """What `ranks.start` uses of a Popen."""

    def __init__(self, argv, environment):
        self.returncode = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            weakref.finalize._registry.clear()  # temporary folders are its parent's to remove
            os._exit(_become(list(map(str, argv)), environment))

    def poll(self):
        return self._wait(os.WNOHANG)

    def wait(self):
        return self._wait(0)

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _wait(self, options):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _become(argv, environment):
    """Runs what Python would run for that command line, and returns the status that it would end with."""
    try:
        os.environ.clear()
        os.environ.update(environment)
        for folder in filter(None, reversed(environment.get("PYTHONPATH", "").split(os.pathsep))):
            if folder not in sys.path:
                sys.path.insert(0, folder)
        torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
        _run(*argv[1:])
        status = 0
    except SystemExit as exit_:
        status = exit_.code
        if not isinstance(status, (int, types.NoneType)):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status or 0


def _run(first, *more):
    if first == "-m":
        name, *arguments = more
        sys.argv = [name, *arguments]
        sys.path.insert(0, os.getcwd())
        sys.modules.pop(name, None)  # as nobody had imported it
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif first == "-c":
        code, *arguments = more
        sys.argv = ["-c", *arguments]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), main.__dict__)
    else:
        sys.argv = [first, *more]
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")
