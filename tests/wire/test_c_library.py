# SPDX-License-Identifier: Apache-2.0
"""The compiled library is made once and kept; what this user did not write whole is never loaded."""

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import commands
import pytest
import torch

from megatron_comp import files
from megatron_comp.wire import c_library, message, native, reference
from megatron_comp.wire.formats import Format

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="needs a C compiler")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

ROOT = Path(__file__).parents[2]
FLAGS = ["-shared", "-fPIC"]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "answer.c").write_text("int answer(void) { return 42; }\n")
    return tmp_path / "c" / "answer.c"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGATRON_COMP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "native"


@pytest.fixture
def hostile(tmp_path):
    """(bytes of a library that leaves a file as it is loaded, that file)"""
    (tmp_path / "hostile.c").write_text(
        f'#include <stdio.h>\n__attribute__((constructor)) void run(void) {{ fclose(fopen("{tmp_path}/ran", "w")); }}\n'
    )
    subprocess.run([*native.compiler(), *FLAGS, tmp_path / "hostile.c", "-o", tmp_path / "hostile.so"], check=True)
    return (tmp_path / "hostile.so").read_bytes(), tmp_path / "ran"


def load(source):
    return c_library.load(source, native.compiler(), FLAGS)


@pytest.fixture
def made(source, tmp_path, monkeypatch):
    """A folder of the library and its digest; no library was loaded from a file of another folder."""
    with monkeypatch.context() as patch:
        patch.setenv("MEGATRON_COMP_CACHE", str(tmp_path / "elsewhere"))
        assert load(source).answer() == 42
    return tmp_path / "elsewhere" / "native"


def names(folder):
    return sorted(file.suffix for file in folder.iterdir())


def test_kept_in_a_folder_of_its_user_alone(source, cache):
    umask = os.umask(0o002)
    try:
        assert load(source).answer() == 42
    finally:
        os.umask(umask)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700 and names(cache) == [".sha256", ".so"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in cache.iterdir()} == {0o600}
    before = {file: file.stat().st_ino for file in cache.iterdir()}
    assert load(source).answer() == 42
    assert {file: file.stat().st_ino for file in cache.iterdir()} == before


def plant(made, cache, library=None, digest=None):
    """Copies of what was made, with other contents where given."""
    cache.mkdir(parents=True, mode=0o700)
    for file in made.iterdir():
        content = {".so": library, ".sha256": digest}[file.suffix]
        (cache / file.name).write_bytes(file.read_bytes() if content is None else content)
        (cache / file.name).chmod(0o600)
    return next(cache.glob("*.so")), next(cache.glob("*.sha256"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "other", "no digest", "empty digest", "link", "writable"])
def test_a_library_that_is_not_whole_or_not_ours_is_compiled_anew(made, cache, source, hostile, tmp_path, damage):
    content, ran = hostile
    library, digest = plant(made, cache)
    whole = library.read_bytes()
    if damage == "truncated":
        library.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        library.write_bytes(b"")
    elif damage == "link":
        library.unlink()
        library.symlink_to(tmp_path / "hostile.so")
    elif damage == "writable":
        library.write_bytes(content)
        library.chmod(0o666)
    else:
        library.write_bytes(content)
        if damage == "no digest":
            digest.unlink()
        elif damage == "empty digest":
            digest.write_bytes(b"")
    assert load(source).answer() == 42
    assert library.read_bytes() == whole and not library.is_symlink() and not ran.exists()
    assert names(cache) == [".sha256", ".so"]


def digest_of(content):
    return c_library.hashlib.sha256(content).hexdigest().encode()


@needs_root
def test_a_library_of_another_user_is_compiled_anew(made, cache, source, hostile):
    content, ran = hostile
    for file in plant(made, cache, content, digest_of(content)):
        os.chown(file, 65534, 65534)
    assert load(source).answer() == 42 and not ran.exists()
    assert {file.stat().st_uid for file in cache.iterdir()} == {0}


@pytest.mark.parametrize("whose", ["ours, that others can write", pytest.param("another user's", marks=needs_root)])
def test_a_folder_that_others_can_write_is_left_alone(made, cache, source, hostile, whose):
    content, ran = hostile
    library, _ = plant(made, cache, content, digest_of(content))
    if whose == "another user's":
        os.chown(cache, 65534, 65534)
    else:
        cache.chmod(0o777)
    with pytest.warns(UserWarning, match="answer.c is compiled for this process alone: .*native'"):
        assert load(source).answer() == 42
    assert library.read_bytes() == content and not ran.exists()


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_lock_that_links_to_another_file_leaves_it_as_it_is(cache, source, tmp_path, made, link):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    library, digest = plant(made, cache)
    library.unlink()
    link(victim, library.with_name(f".{library.name}.lock"))
    with pytest.warns(UserWarning, match="compiled for this process alone"):
        assert load(source).answer() == 42
    assert victim.read_text() == "precious"


HOLDER = """
import sys, time
from megatron_comp import files
with files.locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_stopped_compiler_is_named_after_a_while(cache, source, made, monkeypatch):
    library, digest = plant(made, cache)
    library.unlink()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, library], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(c_library, "WAIT_SECONDS", 0.5)
        with pytest.raises(files.InUse, match=f"process {holder.pid} on .* 0 seconds: end .*MEGATRON_COMP_CACHE"):
            load(source)
    finally:
        holder.kill()
        holder.communicate()
    assert load(source).answer() == 42  # what a killed process held is free
    assert names(cache) == [".sha256", ".so"]


ENCODE = """
import sys, torch
from megatron_comp.wire.codec import Codec
x = torch.linspace(-9, 9, 999).view(3, 333)
print(Codec.parse("mxfp4").encode(x).sum().item())
"""


def environment_of(cache, **more):
    environment = {**os.environ, "MEGATRON_COMP_CACHE": str(cache), "PYTHONPATH": str(ROOT), **more}
    environment.pop("MEGATRON_COMP_BACKEND", None)
    return {key: value for key, value in environment.items() if value is not None}


def encode(cache, **environment):
    """The finished process that encodes with that folder of caches."""
    return commands.run([sys.executable, "-c", ENCODE], environment_of(cache, **environment))


def expected_output():
    x, fmt = torch.linspace(-9, 9, 999).view(3, 333), Format.parse("mxfp4")
    out = torch.empty(message.layout(fmt, 3, 333).nbytes, dtype=torch.uint8)
    reference.encode(x, fmt, out)
    return f"{out.sum().item()}\n"


@pytest.fixture
def counting_compiler(tmp_path):
    """(a compiler that takes a line in a log for each compilation, and does not optimize; the log)"""
    log, script = tmp_path / "log", tmp_path / "counting-cc"
    log.touch()
    real = " ".join(native.compiler())
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo compiled >> {log}\nexec {real} "$@" -O0\n')
    script.chmod(0o755)
    return str(script), log


def test_ranks_that_start_together_compile_once_and_later_ones_never(tmp_path, counting_compiler):
    compiler, log = counting_compiler
    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            ranks = list(pool.map(lambda _: encode(tmp_path / "cache", CC=compiler), range(3)))
        assert [(rank.stdout, rank.stderr) for rank in ranks] == [(expected_output(), "")] * 3
        assert log.read_text() == "compiled\n"
    assert names(tmp_path / "cache" / "native") == [".sha256", ".so"]


def test_a_cache_that_cannot_be_written(tmp_path, counting_compiler):
    compiler, log = counting_compiler
    (tmp_path / "file").touch()
    done = encode(tmp_path / "file", CC=compiler)
    assert done.stdout == expected_output() and log.read_text() == "compiled\n"
    assert "UserWarning: native.c is compiled for this process alone" in done.stderr


@needs_root
@pytest.mark.parametrize("options, told", [("size=32k", "No space left"), ("noexec", "failed to map")])
def test_a_cache_that_is_full_or_noexec(tmp_path, counting_compiler, options, told):
    (tmp_path / "mount").mkdir()
    mount = f'mount -t tmpfs -o {options} none {tmp_path}/mount && exec "$@"'
    if subprocess.run(["unshare", "-m", "sh", "-c", mount, "sh", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")

    def encode_there(**more):
        command = ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, "-c", ENCODE]
        env = environment_of(tmp_path / "mount" / "cache", CC=counting_compiler[0], **more)
        return subprocess.run(command, env=env, capture_output=True, text=True)

    done = encode_there()
    assert done.stdout == expected_output()
    assert "compiled for this process alone" in done.stderr and told in done.stderr
    if options == "noexec":
        done = encode_there(TMPDIR=str(tmp_path / "mount"))
        assert done.returncode == 1
        assert "MEGATRON_COMP_CACHE or TMPDIR" in done.stderr and "BACKEND=reference" in done.stderr


@needs_root
def test_a_user_without_a_home(tmp_path, monkeypatch):
    """As in containers: no HOME, and no entry of this user among the machine's."""
    made = Path(tempfile.mkdtemp(prefix="no-home-", dir="/tmp"))  # where any user may look, unlike pytest's folders
    made.chmod(0o777)
    monkeypatch.chdir(made)
    for name in ("HOME", "XDG_CACHE_HOME", "MEGATRON_COMP_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(made))
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.setuid(54321)
            files.private_folder(files.cache_folder() / "native")
        os._exit(0)
    os.waitpid(child, 0)
    folder = made / "megatron_comp-54321" / "native"
    status = folder.stat()
    left = list(made.iterdir())
    shutil.rmtree(made)
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (54321, 0o700) and left == [folder.parent]


def test_a_compiler_that_fails_is_an_error(tmp_path):
    script = tmp_path / "broken-cc"
    script.write_text("#!/bin/sh\necho 'native.c:1: no such header' >&2\nexit 4\n")
    script.chmod(0o755)
    done = encode(tmp_path / "cache", CC=str(script))
    assert done.returncode == 1 and done.stdout == ""
    assert f"RuntimeError: {script}" in done.stderr
    assert "failed with exit status 4:\nnative.c:1: no such header" in done.stderr


def test_without_a_compiler_the_reference_serves_and_says_that_it_is_slow(tmp_path):
    (tmp_path / "empty").mkdir()
    for environment, tried in [({"CC": None}, "cc, gcc, clang"), ({"CC": "no-such-cc -m64"}, "no-such-cc -m64")]:
        done = encode(tmp_path / "cache", PATH=str(tmp_path / "empty"), **environment)
        assert done.stdout == expected_output()
        assert done.stderr.count(": Notice: ") == 1
        assert f"tried {tried}" in done.stderr and "times slower" in done.stderr
    assert not (tmp_path / "cache").exists()
