# SPDX-License-Identifier: Apache-2.0
"""`examples/fetch.py tasks`, on an archive of our own in the place of the package of 358 MB."""

import hashlib
import json
import tarfile
from pathlib import Path

import pytest
import yaml
from task_items import ITEMS, task_json

from examples import fetch

NAME = "bigbench_strategyqa"


@pytest.fixture
def archive(tmp_path, monkeypatch):
    (tmp_path / "task.json").write_text(json.dumps(task_json()))
    path = tmp_path / "bigbench.tar.gz"
    with tarfile.open(path, "w:gz") as packed:
        packed.add(tmp_path / "task.json", fetch.TASKS_MEMBER.format("strategyqa"))
    monkeypatch.setattr(fetch, "TASKS", {NAME: fetch.TASKS[NAME]})
    monkeypatch.setattr(fetch, "TASKS_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(fetch, "download", lambda *_: path)
    return path


def test_tasks(archive, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "tasks"
    fetch.fetch_tasks(folder)
    described = yaml.safe_load((folder / f"{NAME}.yaml").read_text())
    file = described["dataset_kwargs"]["data_files"]["test"]
    assert file == str(folder / f"{NAME}.jsonl")
    items = [json.loads(line) for line in Path(file).read_text().splitlines()]
    assert sorted((item["context"], item["choices"], item["gold"], item["canary"]) for item in items) == sorted(
        (f"Q: {question}\nA:", choices, right, "made up") for question, choices, right in ITEMS
    )
    assert (folder / ".gitignore").read_text() == "*\n"
    monkeypatch.setattr(fetch, "download", None)
    fetch.fetch_tasks(folder)
    assert "is already there" in capsys.readouterr().out


def test_an_altered_archive_leaves_nothing(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "TASKS_SHA256", "0" * 64)
    with pytest.raises(SystemExit, match="an altered download"):
        fetch.fetch_tasks(tmp_path / "tasks")
    assert not (tmp_path / "tasks").exists()


def test_phrases_take_the_place_of_their_letters():
    question = 'Which sentence has the correct adjective order: a " big old red car " b " red big old car " ?'
    content = {"examples": [{"input": question, "target_scores": {"a": 1, "b": 0}}], "canary": ""}
    (item,) = fetch.bigbench_items("bigbench_hyperbaton", content, "It is the")
    assert (item["context"], item["choices"], item["gold"]) == ("It is the", ["big old red car", "red big old car"], 0)


def test_items_without_exactly_one_right_choice_are_left_out():
    scores = [{"x": 1, "y": 1}, {"x": 0, "y": 0}, {"x": 0, "y ": 1}]
    content = {"examples": [{"input": "?", "target_scores": each} for each in scores], "canary": ""}
    (item,) = fetch.bigbench_items(NAME, content, "{}")
    assert (item["choices"], item["gold"]) == (["x", "y"], 1)
