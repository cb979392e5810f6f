# SPDX-License-Identifier: Apache-2.0
"""C that is compiled at first use and kept, in `native/` of the folder of caches; the next process only loads it.

A library is code, so what is loaded was written by this user: it lies in a folder that nobody else can write, belongs
to this user, and has the digest that stands beside it. Anything else, such as half a library, is compiled anew.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .. import files

# How long a process waits for another one that compiles the same; that takes a few seconds.
WAIT_SECONDS = 120.0


def load(source: Path, compiler: Sequence[str], flags: Sequence[str]) -> ctypes.CDLL:
    """The library of a C file, which may include its neighbours. compiler: the beginning of its command line.

    Where it cannot be kept or loaded (a folder that is read-only, full, noexec, or that others can write), each process
    compiles it for itself, with a warning.

    Raises RuntimeError if the compiler fails or the library can be loaded from nowhere, and files.InUse if another
    process has been compiling it for too long.
    """
    name, command = f"{_fingerprint(source, compiler, flags)}.so", [*compiler, *flags, str(source)]
    try:
        return ctypes.CDLL(str(_kept(files.cache_folder() / "native" / name, command)))
    except OSError as error:
        warnings.warn(f"{source.name} is compiled for this process alone: {error}", stacklevel=2)
    with tempfile.TemporaryDirectory(prefix="megatron-comp-") as folder:
        library = _compile(command, Path(folder, name))
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:
            raise RuntimeError(
                f"{error}: expected a folder that programs can be loaded from. Set MEGATRON_COMP_CACHE or TMPDIR to "
                "one, or MEGATRON_COMP_BACKEND=reference, which needs no library and is slow"
            ) from None


def _kept(library: Path, command: list[str]) -> Path:
    """Compiles it if the cache holds none. One of many ranks does so, and the others wait."""
    files.private_folder(library.parent)
    if _is_whole(library):
        return library
    try:
        with files.locked(library, WAIT_SECONDS):
            if not _is_whole(library):
                with tempfile.TemporaryDirectory(prefix="megatron-comp-") as folder:
                    content = _compile(command, Path(folder, library.name)).read_bytes()
                digest = hashlib.sha256(content).hexdigest().encode()
                for file, written in ((library, content), (library.with_suffix(".sha256"), digest)):
                    file.unlink(missing_ok=True)  # a link would be followed
                    files.write_bytes(file, written, mode=0o600)
    except files.InUse as error:
        raise files.InUse(
            f"{error}, and has been for {WAIT_SECONDS:.0f} seconds: end that process, or set MEGATRON_COMP_CACHE to "
            "another folder"
        ) from None
    return library


def _is_whole(library: Path) -> bool:
    """Whether this user wrote the library, and all of it is there."""
    try:
        content, digest = (_read_own(library.with_suffix(suffix)) for suffix in (".so", ".sha256"))
    except OSError:
        return False
    return hashlib.sha256(content).hexdigest().encode() == digest


def _read_own(path: Path) -> bytes:
    with os.fdopen(files.open_own(path), "rb") as file:
        return file.read()


def _fingerprint(source: Path, compiler: Sequence[str], flags: Sequence[str]) -> str:
    """Of all that decides what the compiler makes. `-march=native` depends on the processor."""
    version = subprocess.run([*compiler, "--version"], capture_output=True).stdout
    cpu: list[str] | str = platform.processor()
    with suppress(OSError):
        cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        cpu = [line for line in cpu if line.startswith(("model name", "flags", "CPU part", "Features", "isa"))]
    sources = [(file.name, file.read_bytes()) for file in sorted(source.parent.glob("*.[ch]"))]
    parts = [version, repr((sources, compiler, flags, platform.machine(), cpu)).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _compile(command: list[str], library: Path) -> Path:
    command = [*command, "-o", str(library)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = "\n".join((result.stderr or result.stdout).splitlines()[:10])
        raise RuntimeError(f"{shlex.join(command)} failed with exit status {result.returncode}:\n{lines}")
    return library
