# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from task_items import ITEMS, write_tasks

from megatron_comp import cli

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: the extra 'tasks'")

LIMIT = 6
CODEC, ITEMS_FILE = "int8:32:fp16", "int8_32_fp16.jsonl"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


def test_settings_on_the_same_items(command, smollm2, tasks, tmp_path):
    """And what is known already is not computed again, so a second run gives the same to the last bit."""
    words = ["evaluate", "--model", smollm2, "--tp", 3, "--tasks", "made_up", "--include-path", tasks, "--limit", LIMIT]
    words += ["--codec", CODEC, "--algorithm", "gather_sum", "--state", tmp_path / "state", "--items", tmp_path]
    done = command(*words, "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["codec"], row["metric"], row["items"]) for row in rows] == [
        *(("none", "acc", LIMIT), ("none", "acc_norm", LIMIT)),
        *((CODEC, "acc", LIMIT), (CODEC, "acc_norm", LIMIT)),
    ]
    bits = {row["codec"]: row["bits_per_value"] for row in rows}
    assert bits["none"] == 32 and bits[CODEC] == pytest.approx(8.5, abs=0.01)  # messages end at 16 bytes

    (stock_header, *stock), (header, *ours) = lines(tmp_path / "none.jsonl"), lines(tmp_path / ITEMS_FILE)
    assert (header["kind"], header["setting"], header["tp"], header["dtype"]) == ("items", CODEC, 3, "float32")
    assert stock_header["setting"] == "none" and f"--codec {CODEC}" in header["command"]
    texts = {tuple(map(len, choices)): choices for _, choices, _ in ITEMS}
    for item, other in zip(stock, ours, strict=True):
        # In bf16, of 600 choices, 1.6 was the most.
        assert item["choices"] != other["choices"] == pytest.approx(item["choices"], abs=3)
        assert {key: item[key] for key in ("task", "item", "lengths", "gold")} == {
            key: other[key] for key in ("task", "item", "lengths", "gold")
        }
        assert tuple(item["lengths"]) in texts
    # The accuracy is that of the items.
    right = [max(range(3), key=item["choices"].__getitem__) == item["gold"] for item in stock]
    assert rows[0]["value"] == sum(right) / LIMIT >= 0.5  # a model that reads them as they are is not at chance

    before = (tmp_path / ITEMS_FILE).read_text()
    done = command(*words, "--json", tmp_path / "again.json")
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "again.json").read_text())["rows"]
    assert [row["value"] for row in again] == [row["value"] for row in rows]
    assert {row["bits_per_value"] for row in again} == {None}  # nothing was sent
    assert lines(tmp_path / ITEMS_FILE)[1:] == [json.loads(line) for line in before.splitlines()[1:]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give --text FILE or --tasks NAMES, one of the two"),
        (["--text", "t", "--tasks", "a"], "give --text FILE or --tasks NAMES, one of the two"),
        (["--tasks", "a", "--limit", "0"], "--limit 0: at least one is needed"),
        (["--tasks", "a", "--include-path", "nowhere"], "--include-path nowhere: no such folder"),
        (["--tasks", "a", "--items", "nowhere"], "--items nowhere: no such folder"),
        (["--text", "cli.py", "--limit", "4"], "--limit goes with --tasks"),
    ],
)
def test_wrong_options(capsys, monkeypatch, llama, arguments, message):
    monkeypatch.chdir(cli.__file__.removesuffix("cli.py"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert cli.main(["evaluate", "--model", str(llama), "--tp", "2", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_the_harness_one_line_says_what_to_install(capsys, monkeypatch, llama):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["evaluate", "--model", str(llama), "--tp", "2", "--tasks", "arc_easy"]) == 2
    assert capsys.readouterr().err.strip().endswith("pip install 'megatron-comp[tasks]'")
