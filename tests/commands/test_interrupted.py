# SPDX-License-Identifier: Apache-2.0
"""Commands that are interrupted, and two at work on one file: nothing stays behind, and no later command is kept."""

import json
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from checkpoints import tiny_llama
from locks import lock_held
from searches import LENGTH

from megatron_comp import cli
from megatron_comp.commands import convert


@pytest.fixture
def held(tmp_path):
    """A path that another process is at work on."""
    with lock_held(tmp_path / "held"):
        yield tmp_path / "held"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A Llama of 170 MB, which takes a while to write."""
    return tiny_llama(tmp_path_factory.mktemp("large"), hidden_size=512, vocab_size=40_000)


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_an_interrupted_conversion(start_command, command, large, tmp_path, number):
    """Leaves nothing; after SIGKILL, which nobody can answer, the same command goes on as if nothing had been."""
    out = tmp_path / "out"
    process = start_command("convert", "--model", large, "--out", out)
    wait_for(lambda: list(tmp_path.glob(".out.partial/release/*.distcp")), process)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    if number != signal.SIGKILL:
        assert not list(tmp_path.iterdir())
        return
    time.sleep(1)  # the ranks end with their starter
    again = command("convert", "--model", large, "--out", out)
    assert again.returncode == 0, again.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_two_conversions_to_one_folder(command, large, tmp_path):
    """One of them is refused, and its end takes nothing from the other."""
    out = tmp_path / "out"
    with ThreadPoolExecutor(2) as threads:
        done = list(threads.map(lambda _: command("convert", "--model", large, "--out", out), range(2)))
    statuses = [each.returncode for each in done]
    assert sorted(statuses) == [0, 2], done
    refused = done[statuses.index(2)].stderr
    assert "is at work on it" in refused or "is not an empty folder" in refused
    assert [file.name for file in tmp_path.iterdir()] == ["out"] and (
        out / "latest_checkpointed_iteration.txt"
    ).exists()


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_whatever_an_earlier_conversion_left_is_removed(tmp_path, what):
    partial = convert.partial_of(tmp_path / "out")
    (tmp_path / "other").mkdir()
    if what == "folder":
        (partial / "release").mkdir(parents=True)
    elif what == "file":
        partial.write_text("")
    else:
        partial.symlink_to("other")
    convert.remove(partial)
    convert.remove(partial)
    assert [file.name for file in tmp_path.iterdir()] == ["other"]


COMMANDS = {
    "convert": ("--out",),
    "search": ("--tp", "2", "--max-kl", "0.1", "--out", "policy.yaml", "--text", "{text}", "--state"),
    "drop sensitivity": ("--tp", "2", "--text", "{text}", "--state"),
    "drop curve": ("--tp", "2", "--text", "{text}", "--state"),
    "drop distill": ("--tp", "2", "--blocks", "0", "--text", "{text}", "--out"),
    "drop group": ("--tp", "2", "--blocks", "0", "--text", "{text}", "--out"),
}


@pytest.mark.parametrize("name, arguments", COMMANDS.items(), ids=COMMANDS)
def test_what_another_command_works_on_is_refused_at_once(capsys, monkeypatch, llama, text, held, name, arguments):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(held.parent)
    monkeypatch.setattr(cli.ranks, "start", lambda *_: pytest.fail("ranks were started"))
    words = [word.format(text=text) for word in (*(LENGTH if "--text" in arguments else ()), *arguments)]
    assert cli.main([*name.split(), "--model", str(llama), *words, str(held)]) == 2
    errors = capsys.readouterr().err
    assert f"{held}: process " in errors and "is at work on it" in errors and errors.count("\n") == 1


POINT = {"bits_per_value": 4.5, "kl": 0.1, "nll": 3.0, "base_nll": 2.9, "top1_agreement": 0.9}
STATES = {
    "a list": "[1]",
    "settings are a list": {"settings": [1], "points": {}},
    "points are a list": {"settings": {"model": "m"}, "points": [1]},
    "a point is a number": {"settings": {"model": "m"}, "points": {"a": 1}},
    "a point lacks its numbers": {"settings": {"model": "m"}, "points": {"a": POINT | {"kl": "low"}}},
    "sensitivity is a word": {"settings": {"model": "m"}, "sensitivity": "low"},
    "sensitivity has no rows": {"settings": {"model": "m"}, "sensitivity": {"windows": 1, "rows": [1]}},
    "another model": {"settings": {"model": "n"}},
    "deep": "[" * 100_000,
    "not UTF-8": b"\xff\xfe\xff",
}


@pytest.fixture
def journal(tmp_path, monkeypatch):
    """What a command makes of a state with this content."""
    from megatron_comp.quality import journal

    monkeypatch.setattr(journal.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(journal.dist, "broadcast_object_list", lambda *_: None)

    def read(content):
        path = tmp_path / "state.json"
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return journal.Journal(str(path), {"model": "m"})

    return read


@pytest.mark.parametrize("content", STATES.values(), ids=STATES)
def test_a_state_that_is_none(journal, content):
    with pytest.raises(ValueError, match=r"--state .*state.json is (not|of)") as error:
        journal(content)
    assert len(str(error.value)) < 500


def test_a_state_that_is_one(journal):
    parts = {"points": {"a": POINT}, "sensitivity": {"windows": 1, "rows": [{"layer": 0}]}}
    found = journal({"settings": {"model": "m"}, **parts})
    assert found.continued and {part: found[part] for part in parts} == parts


@pytest.mark.parametrize(
    "index", ['["a"]', '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', '{"weight_map": 3}', "[" * 100_000, "{}"]
)
def test_an_index_that_is_none(llama, tmp_path, index):
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "model.safetensors.index.json").write_text(index)
    from megatron_comp.inference.hf import Checkpoint

    with pytest.raises(ValueError, match=r"model.safetensors.index.json is not (an index of|valid)") as error:
        Checkpoint(tmp_path / "model")
    assert len(str(error.value)) < 500
