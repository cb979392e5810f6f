# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp bench ttft` on a tiny model: rows, the bytes that a prefill sends, files, and what it refuses."""

import csv
import json
import re
from dataclasses import replace

import pytest
import torch
from characters import character_llama
from ranks import run_ranks
from safetensors.torch import save_file

from megatron_comp import cli
from megatron_comp.commands import bench_ttft, links, setup
from megatron_comp.policy import CompressionPolicy

COLUMNS = ["layout", "policy", "algorithm", "tp", "pp", "link", "prompt_tokens", "dtype", "dropped", "ttft_ms"]
COLUMNS += ["p20_ms", "p80_ms", "speedup_vs_none", "speedup_low", "speedup_high", "bytes_per_rank"]
DECODE = ["decode_ms", "decode_speedup", "decode_speedup_low", "decode_speedup_high"]
LAYERS, HIDDEN = 3, 96


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return character_llama(tmp_path_factory.mktemp("tiny"), num_hidden_layers=LAYERS, hidden_size=HIDDEN)


def measured(_rank, ranks, folder, tokens, runs, new_tokens):
    from megatron_comp.inference.generate import generate
    from megatron_comp.inference.model import build_model, destroy_parallel, init_parallel

    seen = []

    def watched(model, ids, new_tokens):
        seen.append((ids.shape[1], new_tokens, model.compression_hook is not None))
        return generate(model, ids, new_tokens)

    import megatron_comp.inference.generate as module

    init_parallel(ranks)
    module.generate = watched
    settings = [setup.NONE]
    for algorithm in ("gather_sum", "two_step"):
        settings.append(setup.Setting(algorithm, CompressionPolicy(codec="mxfp4", algorithm=algorithm, min_bytes=0)))
    settings.append(setup.Setting("drop", replace(settings[1].policy, layers={0: {"attention": "drop"}, 1: "none"})))
    try:
        return bench_ttft.measure(build_model(folder), settings, tokens, runs, new_tokens), seen
    finally:
        module.generate = generate
        destroy_parallel()


def test_rows(tiny):
    (rows, seen), *_ = run_ranks(measured, 2, tiny, 8, 3, 4, init=False)
    assert seen == [(8, 1, True)] * 4 + [(8, 4, True)] * 3 * 4  # the whole prompt; what is not counted only once
    assert [list(row) for row in rows] == [COLUMNS + DECODE] * 4
    assert [(row["policy"], row["algorithm"]) for row in rows] == [
        ("none", "all_reduce"),
        *zip(*[("gather_sum", "two_step")] * 2),
        ("drop", "gather_sum"),
    ]
    # Two sums per layer of fp32 [8, 96]: a ring receives the tensor once, a message of mxfp4 is 48 + 3 bytes per row,
    # sections padded to 16; of 4 rows 192 + 16.
    expected = [8 * HIDDEN * 4, 8 * 48 + 32, 2 * (4 * 48 + 16)]
    ring, message, _ = expected
    received = [2 * LAYERS * nbytes for nbytes in expected]
    assert [row["bytes_per_rank"] for row in rows] == [*received, 2 * ring + 3 * message]
    assert [row["dropped"] for row in rows] == [0, 0, 0, 1]
    for row in rows:
        assert (row["tp"], row["prompt_tokens"], row["dtype"], row["link"]) == (2, 8, "float32", "local")
        assert 0 < row["p20_ms"] <= row["ttft_ms"] <= row["p80_ms"]
        assert row["speedup_vs_none"] == pytest.approx(rows[0]["ttft_ms"] / row["ttft_ms"])
        assert row["speedup_low"] <= row["speedup_vs_none"] <= row["speedup_high"]
        assert row["decode_speedup"] == pytest.approx(rows[0]["decode_ms"] / row["decode_ms"])
        assert row["decode_speedup_low"] <= row["decode_speedup"] <= row["decode_speedup_high"]
        assert row["decode_ms"] < row["ttft_ms"] * 8


def test_prefill_alone(tiny):
    (rows, seen), *_ = run_ranks(measured, 2, tiny, 8, 1, 1, init=False)
    assert seen == [(8, 1, True)] * 2 * 4 and [list(row) for row in rows] == [COLUMNS] * 4
    assert (rows[1]["speedup_low"], rows[1]["speedup_high"]) == (rows[1]["speedup_vs_none"],) * 2  # of a single turn


def test_command_with_policies(command, tmp_path):
    """One of them with weights of its own, as `megatron-comp search --with-drop` writes them."""
    folder = character_llama(tmp_path / "model", num_hidden_layers=LAYERS)
    save_file({"model.layers.1.mlp.up_proj.weight": torch.zeros(144, 96)}, tmp_path / "w", {"tensor_parallel": "2"})
    (tmp_path / "four.yaml").write_text("codec: mxfp4\nmin_bytes: 0\n")
    (tmp_path / "drop.yaml").write_text("codec: mxfp8\nmin_bytes: 0\nlayers: {1: {attention: drop}}\n")
    policies = [str(tmp_path / name) for name in ("four.yaml", "drop.yaml")]
    files = {"json": tmp_path / "rows.json", "csv": tmp_path / "rows.csv", "figure": tmp_path / "rows.png"}
    done = command(
        *("bench", "ttft", "--model", folder, "--tp", 2, "--tokens", 8, "--runs", 1, "--layout", "1x1"),
        *(f"--policy={policy}" for policy in policies),
        *(f"--{option}={file}" for option, file in files.items()),
        *("--weights", tmp_path / "w"),
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(files["json"].read_text())
    assert [row["policy"] for row in content["rows"]] == ["none", *policies, "none"]  # one rank compresses nothing
    assert [row["layout"] for row in content["rows"]] == ["TP=2"] * 3 + ["TP=1"]
    assert [row["dropped"] for row in content["rows"]] == [0, 0, 1, 0]
    first, *_, alone = content["rows"]
    assert alone["speedup_vs_first"] == first["ttft_ms"] / alone["ttft_ms"] and alone["bytes_per_rank"] == 0
    assert {row["dtype"] for row in content["rows"]} == {"bfloat16"}
    assert all(row["device"] and row["date"] and row["torch"] for row in content["rows"])
    assert content["config"]["prompt_tokens"] == 8 and "threads" in content["config"]["device"]
    with files["csv"].open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["ttft_ms"]) for line in lines] == [row["ttft_ms"] for row in content["rows"]]
    assert files["figure"].read_bytes().startswith(b"\x89PNG")
    assert "four.yaml" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt-tokens", "0"], r"--prompt-tokens 0: at least one"),
        (["--runs", "0"], r"--runs 0: at least one"),
        (["--new-tokens", "0"], r"--new-tokens 0: at least one"),
        (["--link", "1"], r"--link '1' is no rate of a link"),
        (["--codec", "mxfp5"], r"codec 'mxfp5' is neither a preset"),
        (["--policy", "nowhere.yaml"], r"nowhere.yaml"),
        (["--layout", "2"], r"--layout 2: expected TPxPP, both at least 1, as in 2x2"),
        (["--layout", "2x2"], r"--layout 2x2: more ranks than the 2 of --tp and --pp"),
        (["--pp", "4"], r"pipeline_parallel is 4, but this model has 3 layers"),
        (["--pp", "0"], r"--pp 0: at least one stage is needed"),
        (["--model", "nowhere"], r"--model nowhere: no such folder"),
    ],
)
def test_bad_input(monkeypatch, error_line, tiny, arguments, message):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(links.ranks, "start", lambda *_, **__: pytest.fail("ranks were started"))
    assert cli.main(["bench", "ttft", "--model", str(tiny), "--tp", "2", *arguments]) == 2
    assert re.search(message, error_line())
