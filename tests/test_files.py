# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, and YAML that costs no more than its size."""

import ast
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from locks import lock_held

from megatron_comp import files, yaml_files
from megatron_comp.policy import CompressionPolicy
from megatron_comp.wire.calibration import Calibration

ALIASES = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 11)]
)
MERGES = "\n".join(
    ["m0: &m0 {x: 1}"] + [f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}" for n in range(1, 11)]
)
HOSTILE = {
    "aliases": (ALIASES, "stands for more than 200,000 values"),
    "merges": (MERGES, "stands for more than 200,000 values"),
    "endless": ("a: &a [*a]", "an alias stands inside of what it names"),
    "deep lists": ("[" * 5000, "nests deeper than 32 levels"),
    "deep mappings": ("{a: " * 5000, "nests deeper than 32 levels"),
    "deep blocks": ("- " * 5000 + "a", "nests deeper than 32 levels"),
    "digits": (f"margin: {'9' * 400}", "a number of 400 digits"),
    "more digits than Python prints": (f"min_bytes: {'9' * 5000}", "a number of 5000 digits"),
    "large": ("# " + "x" * (2 << 20), "more than 1,048,576 bytes"),
    "a list as a key": ("? [1, 2]\n: 3", "a list or a mapping is no key"),
}


@pytest.mark.parametrize("read", [CompressionPolicy.from_file, Calibration.from_file])
@pytest.mark.parametrize("text, told", HOSTILE.values(), ids=HOSTILE)
def test_hostile_yaml_is_refused_in_few_words(tmp_path, read, text, told):
    (tmp_path / "file.yaml").write_text(text)
    start = time.process_time()
    with pytest.raises(ValueError, match=told) as error:
        read(tmp_path / "file.yaml")
    assert time.process_time() - start < 5 and len(str(error.value)) < 1000


@pytest.mark.parametrize("read", [CompressionPolicy.from_file, Calibration.from_file])
def test_errors_show_little_of_a_large_value(tmp_path, read):
    """Within bounds, yet 100,000 values under a key that takes none of them."""
    (tmp_path / "file.yaml").write_text(f"codec: {['x' * 9] * 40_000}\nschema: {['y' * 9] * 40_000}\n")
    with pytest.raises(ValueError, match="file.yaml") as error:
        read(tmp_path / "file.yaml")
    assert len(str(error.value)) < 1500


def test_many_keys_take_time_in_proportion(tmp_path):
    (tmp_path / "policy.yaml").write_text("layers:\n" + "".join(f"  {n}: mxfp4\n" for n in range(20_000)))
    start = time.process_time()
    policy = CompressionPolicy.from_file(tmp_path / "policy.yaml")
    assert time.process_time() - start < 20  # `keys.count` took 5.5 s on top of PyYAML's own time, and grew by squares
    assert (
        policy.codec_name(19_999, "mlp", "prefill") == "mxfp4" and policy.codec_name(20_000, "mlp", "prefill") == "none"
    )


def test_merge_keys(tmp_path):
    """As YAML's own loader reads them, and a merged key may be overruled."""
    text = (
        "layers:\n  0: &quiet {attention: none, mlp: mxfp8}\n  1: &loud {<<: *quiet, mlp: mxfp4}\n"
        "  2: {<<: [*loud, *quiet], attention: mxfp6}\n"
    )
    (tmp_path / "policy.yaml").write_text(text)
    assert yaml_files.read_yaml(tmp_path / "policy.yaml", "policy file") == yaml.safe_load(text)
    policy = CompressionPolicy.from_file(tmp_path / "policy.yaml")
    assert [policy.codec_name(n, "attention", "decode") for n in range(3)] == ["none", "none", "mxfp6"]
    assert [policy.codec_name(n, "mlp", "decode") for n in range(3)] == ["mxfp8", "mxfp4", "mxfp4"]


def test_a_key_is_given_once(tmp_path):
    (tmp_path / "file.yaml").write_text("links:\n  a: 1\n  'a': 2\n")
    with pytest.raises(ValueError, match="'a' is given more than once"):
        Calibration.from_file(tmp_path / "file.yaml")


WRITER = """
import sys
from megatron_comp import files
number = 0
while True:
    files.write_text(sys.argv[1], f"{number} " * 20_000 + "end")
    number += 1
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "policy.yaml"
    for pause in (0.05, 0.11, 0.17, 0.31):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, path])
        try:
            before = path.read_text() if path.exists() else None
            deadline = time.monotonic() + 60
            while not path.exists() or path.read_text() == before:
                assert time.monotonic() < deadline
            time.sleep(pause)
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        words = path.read_text().split()
        assert len(words) == 20_001 and len(set(words[:-1])) == 1 and words[-1] == "end"


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")
    with pytest.raises(KeyError), files.replacing(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert os.listdir(tmp_path) == ["file.json"] and path.read_text() == "old"
    with pytest.raises(FileNotFoundError, match="nowhere/file.json"):
        files.write_text(tmp_path / "nowhere" / "file.json", "")


def test_permissions_and_links_are_kept(tmp_path):
    umask = os.umask(0o027)
    try:
        files.write_text(tmp_path / "new", "1")
        with files.replacing(tmp_path / "made anew") as partial:
            partial.unlink()
            os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors does
    finally:
        os.umask(umask)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "made anew")]
    assert modes == [0o640, 0o640]
    (tmp_path / "new").chmod(0o604)
    (tmp_path / "link").symlink_to("new")
    files.write_text(tmp_path / "link", "2")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "new").read_text() == "2"
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604
    files.write_text("/dev/null", "3")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_caches_of_a_user_without_a_home(monkeypatch, tmp_path):
    for name in ("MEGATRON_COMP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "megatron_comp"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # neither HOME nor a passwd entry
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    assert files.cache_folder() == tmp_path / f"megatron_comp-{os.getuid()}"


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `file`."""
    with lock_held(tmp_path / "file") as process:
        yield process


def test_a_lock_has_one_holder(tmp_path, holder):
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with pytest.raises(files.InUse, match=f"{name}: process {holder.pid} on .* is at work on it"):
            files.check_free(tmp_path / name)
        start = time.monotonic()
        with pytest.raises(files.InUse, match=f"{name}: process {holder.pid} on"), files.locked(tmp_path / name, 0.3):
            pass
        assert 0.3 <= time.monotonic() - start < 5
    files.check_free(tmp_path / "another")


def test_a_killed_process_holds_no_lock(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / ".file.lock").exists()
    files.check_free(tmp_path / "file")
    with files.locked(tmp_path / "file"), pytest.raises(files.InUse, match=f"process {os.getpid()}"):
        files.check_free(tmp_path / "file")
    assert not list(tmp_path.iterdir())


COUNTER = """
import sys, time
from pathlib import Path
from megatron_comp import files
for _ in range(25):
    with files.locked(sys.argv[1], 60):
        count = int(Path(sys.argv[1]).read_text())
        time.sleep(0.001)
        Path(sys.argv[1]).write_text(str(count + 1))
"""


def test_holders_take_turns(tmp_path):
    """Though each removes the file of the lock that the others wait for."""
    (tmp_path / "file").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", COUNTER, tmp_path / "file"]) for _ in range(4)]
    assert [process.wait(120) for process in processes] == [0] * 4
    assert (tmp_path / "file").read_text() == "100" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_lock_is_taken_through_no_link(tmp_path, link):
    (tmp_path / "victim").write_text("precious")
    link(tmp_path / "victim", tmp_path / ".file.lock")
    for use in (files.check_free, lambda path: files.locked(path).__enter__()):
        with pytest.raises(OSError, match=r"\.file\.lock"):
            use(tmp_path / "file")
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"{", "Expecting property name"),
        (b"[" * 100_000, "nests too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of thousands of digits"),
        (b'{"a": "\xe9"}', r"not UTF-8 \(byte 7\)"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "byte order mark"),
    ],
    ids=["cut", "deep", "digits", "latin-1", "utf-16", "mark"],
)
def test_json_that_cannot_be_read(tmp_path, content, problem):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"config .*file.json is not valid JSON: .*{problem}") as error:
        files.read_json(tmp_path / "file.json", "config")
    assert len(str(error.value)) < 500


def test_a_full_disk_is_told_with_the_name_of_the_file():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        files.write_text("/dev/full", "x")


# Calls that write a file. Those of `files` write it whole; so does what stands in a `with files.replacing(...)`.
WRITERS = {"write_text", "write_bytes", "savefig", "save_file", "dump"}
ELSEWHERE = {
    ("cli.py", "open"),  # the null device, in the place of a closed standard output
    ("commands/convert.py", "write_text"),  # into a folder that is renamed as a whole
    ("launcher/ranks.py", "write_text"),  # a rank's last words, in a folder of this run
    ("cli.py", "open"),  # /dev/null
}


def test_nothing_is_written_in_place():
    package, found = Path(files.__file__).parent, set()
    for file in package.rglob("*.py"):
        if file.name == "files.py":
            continue
        whole: set[ast.AST] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.With) and any("replacing(" in ast.unparse(item) for item in node.items):
                whole |= set(ast.walk(node))
            if not isinstance(node, ast.Call) or node in whole:
                continue
            owner, _, name = ast.unparse(node.func).rpartition(".")
            opens = name == "open" and any(isinstance(a, ast.Constant) and "w" in str(a.value) for a in node.args[1:])
            if opens or (owner not in ("", "files") and name in WRITERS) or name == "save_file":
                found.add((file.relative_to(package).as_posix(), name))
    assert found == ELSEWHERE
