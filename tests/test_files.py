"""Files that are whole or not there, and YAML that costs no more than its size."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest
import yaml

from megatron_comp import files
from megatron_comp.policy import CompressionPolicy
from megatron_comp.wire.figures import Figures

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


@pytest.mark.parametrize("read", [CompressionPolicy.from_file, Figures.from_file])
@pytest.mark.parametrize("text, told", HOSTILE.values(), ids=HOSTILE)
def test_hostile_yaml_is_refused_in_few_words(tmp_path, read, text, told):
    (tmp_path / "file.yaml").write_text(text)
    start = time.process_time()
    with pytest.raises(ValueError, match=told) as error:
        read(tmp_path / "file.yaml")
    assert time.process_time() - start < 5 and len(str(error.value)) < 1000


@pytest.mark.parametrize("read", [CompressionPolicy.from_file, Figures.from_file])
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
    assert files.read_yaml(tmp_path / "policy.yaml", "policy file") == yaml.safe_load(text)
    policy = CompressionPolicy.from_file(tmp_path / "policy.yaml")
    assert [policy.codec_name(n, "attention", "decode") for n in range(3)] == ["none", "none", "mxfp6"]
    assert [policy.codec_name(n, "mlp", "decode") for n in range(3)] == ["mxfp8", "mxfp4", "mxfp4"]


def test_a_key_is_given_once(tmp_path):
    (tmp_path / "file.yaml").write_text("links:\n  a: 1\n  'a': 2\n")
    with pytest.raises(ValueError, match="'a' is given more than once"):
        Figures.from_file(tmp_path / "file.yaml")


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
