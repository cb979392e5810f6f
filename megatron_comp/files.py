# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, locks, and the folder of caches."""

import errno
import fcntl
import hashlib
import json
import os
import reprlib
import secrets
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Values as error messages show them: an alias in YAML, or a hostile file, may stand for gigabytes of text.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 6, 8, 80, 80, 40


def shown(value: object) -> str:
    """`repr(value)`, cut to a few hundred characters."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 300 else f"{text[:297]}..."


def digest(path: str | Path) -> str:
    """Twelve digits that tell a file's content from another's."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def beside(path: str, file: str) -> str:
    """`path` as a text in `file` has it: relative to that file's folder."""
    return os.path.relpath(path, Path(file).parent)


@contextmanager
def replacing(path: str | Path, mode: int | None = None) -> Iterator[Path]:
    """Gives the path of a new file beside `path`, of the same suffix, and renames it to `path` at the end.

    Readers see the old file or the whole new one, whenever the process ends. Permissions are `mode`; without it, those
    of the file that is replaced, or of one that `open` makes. A link stays a link. Devices and pipes are written in
    place.

    Raises OSError if the file cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():  # /dev/stdout, a pipe
        with _naming(path):
            yield target
        return
    partial = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}{target.suffix}")
    with _naming(path):
        partial.touch(exist_ok=False)
    if mode is None:
        mode = (target if target.exists() else partial).stat().st_mode & 0o777
    try:
        with _naming(path):
            yield partial
        partial.chmod(mode)  # a writer may have made the file anew, with other permissions
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """An OSError, such as that of a full disk, names the file that somebody asked for."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # another library's, with words of its own
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from None


def write_text(path: str | Path, text: str) -> None:
    """UTF-8; whole or not there."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes, mode: int | None = None) -> None:
    """Whole or not there. mode: permissions, as of `replacing`."""
    with replacing(path, mode) as partial:
        partial.write_bytes(content)


def write_json(path: str | Path, content: object, indent: int | None = None) -> None:
    """One line, or indented; whole or not there."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def read_json(path: str | Path, what: str) -> object:
    """The content of a JSON file; `what` names its kind in errors, as in `config file`.

    Raises ValueError for what is not JSON in UTF-8, nests too deeply or has a number of thousands of digits, OSError if
    the file cannot be opened.
    """
    try:
        return json.loads(Path(path).read_bytes().decode())  # with other encodings transformers fails
    except RecursionError:
        problem = "it nests too deeply"
    except UnicodeDecodeError as error:
        problem = f"it is not UTF-8 (byte {error.start})"
    except json.JSONDecodeError as error:
        problem = "it begins with a byte order mark" if "BOM" in error.msg else str(error)
    except ValueError:  # Python reads no integer of more than 4300 digits
        problem = "it has a number of thousands of digits"
    raise ValueError(f"{what} {path} is not valid JSON: {problem}")


class InUse(ValueError):
    """Another process is at work on a file."""


@contextmanager
def locked(path: str | Path, seconds: float = 0.0) -> Iterator[None]:
    """Keeps other processes from work on `path`, by a lock on a file beside it, which is removed at the end.

    The lock of a process that has ended, however it ended, is free. On a file system without locks nothing is held.

    Raises InUse if another process holds the lock for more than `seconds`, OSError if its file cannot be opened.
    """
    lock, deadline = _lock_of(path), time.monotonic() + seconds
    while True:
        with os.fdopen(open_own(lock, os.O_RDWR | os.O_CREAT), "rb") as file:
            if _take(file.fileno(), fcntl.LOCK_EX):
                if lock.exists() and os.path.samestat(lock.stat(), os.fstat(file.fileno())):
                    try:
                        os.ftruncate(file.fileno(), 0)
                        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
                        yield
                    finally:
                        lock.unlink(missing_ok=True)
                    return
                # Its last holder has removed the file that this lock is on, and others look at a new one.
            elif time.monotonic() >= deadline:
                raise _in_use(path, file.read(200))
        time.sleep(0.05)


def check_free(path: str | Path) -> None:
    """Raises InUse if another process holds the lock of `path`."""
    with suppress(FileNotFoundError), os.fdopen(open_own(_lock_of(path)), "rb") as file:
        if not _take(file.fileno(), fcntl.LOCK_SH):
            raise _in_use(path, file.read(200))


def _lock_of(path: str | Path) -> Path:
    target = Path(os.path.realpath(path))
    return target.with_name(f".{target.name[:100]}.lock")


def _take(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def _in_use(path: str | Path, holder: bytes) -> InUse:
    return InUse(f"{path}: {holder.decode(errors='replace') or 'another process'} is at work on it")


def open_own(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """The descriptor of a plain file that belongs to this user, opened through no link.

    Raises PermissionError for any other file: somebody may have put it there, or may change it. OSError as `os.open`.
    """
    file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    status = os.fstat(file)
    others_write = status.st_mode & 0o022
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink <= 1 and not others_write:
        return file
    os.close(file)
    raise PermissionError(errno.EPERM, "not a plain file of this user that nobody else can write", str(path))


def private_folder(path: Path) -> Path:
    """The folder, which only this user can write; whatever the umask is, it is made so if it is missing.

    Raises PermissionError if it is another user's or others can write it, OSError if it cannot be made.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "belongs to another user", str(path))
    if status.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "other users can write it (`chmod 700` ends that)", str(path))
    return path


def cache_folder() -> Path:
    """The folder that MEGATRON_COMP_CACHE names, else `megatron_comp` in XDG_CACHE_HOME or in `~/.cache`.

    A user without a home, as in some containers, has one in the folder of temporary files.
    """
    if folder := os.environ.get("MEGATRON_COMP_CACHE"):
        return Path(folder).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(base):
        return Path(base, "megatron_comp")
    return Path(tempfile.gettempdir(), f"megatron_comp-{os.getuid()}").absolute()
