# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp bench codec`: rows, files and what it refuses. No test here asserts how long anything takes."""

import csv
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from megatron_comp import cli
from megatron_comp.commands import bench_codec
from megatron_comp.launcher import output

COLUMNS = [
    *("op", "codec", "backend", "rows", "hidden", "dtype", "ranks", "bytes_moved", "median_ms", "p20_ms", "p80_ms"),
    *("gb_per_s", "times_copy", "share_of_copy", "times_empty"),
]
CPU = torch.device("cpu")
CIRCUMSTANCES = ["device", "torch", "triton", "megatron_comp", "date"]
SMALL = ["--device", "cpu", "--backend", "reference", "--shape", "4x64", "--runs", "2", "--tp", "2"]


def test_rows_and_files(bench, capsys, tmp_path):
    files = {option: tmp_path / f"rows.{option}" for option in ("json", "csv")} | {"figure": tmp_path / "rows.svg"}
    shapes = [(5, 64), (8, 32)]
    status = bench(
        *("--device", "cpu", "--backend", "reference", "--repeats", 3, "--ranks", 2, "--ranks", 3),
        *("--codec", "mxfp4", "--codec", "int8:32:fp16", "--shape", "5x64", "--shape", "8x32"),
        *(f"--{option}={file}" for option, file in files.items()),
    )
    assert status == 0
    content = json.loads(files["json"].read_text())
    assert content["config"]["shape"] == ["5x64", "8x32"] and content["versions"]["torch"]
    rows = content["rows"]
    assert all(list(row) == COLUMNS for row in rows)
    expected = []
    for shape, values in zip(shapes, (5 * 64, 8 * 32)):
        # Sections are padded to 16 bytes; a scale is 1 byte in mxfp4 and 2 with fp16.
        mxfp4, int8 = values // 2 + 16, values + {320: 32, 256: 16}[values]
        expected.append(("copy", "none", *shape, 1, 2 * 2 * values))
        for name, message in (("mxfp4", mxfp4), ("int8:32:fp16", int8)):
            expected.append(("encode", name, *shape, 1, 2 * values + message))
            expected += [("decode_sum", name, *shape, ranks, ranks * message + 2 * values) for ranks in (2, 3)]
            expected += [("decode_sum_encode", name, *shape, ranks, (ranks + 1) * message) for ranks in (2, 3)]
    assert [
        tuple(row[k] for k in ("op", "codec", "rows", "hidden", "ranks", "bytes_moved")) for row in rows
    ] == expected
    copies = {row["rows"]: row for row in rows if row["op"] == "copy"}
    for row in rows:
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["gb_per_s"] == pytest.approx(row["bytes_moved"] / row["median_ms"] / 1e6)
        assert row["times_copy"] == pytest.approx(row["median_ms"] / copies[row["rows"]]["median_ms"])
        assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / copies[row["rows"]]["gb_per_s"])

    with files["csv"].open() as file:
        lines = list(csv.DictReader(file))
    assert [list(line) for line in lines] == [COLUMNS + CIRCUMSTANCES] * len(rows)
    assert [float(line["median_ms"]) for line in lines] == [row["median_ms"] for row in rows]
    assert all(line["torch"] == torch.__version__ and re.fullmatch(r"\d{4}-\d\d-\d\d", line["date"]) for line in lines)

    assert files["figure"].read_text().startswith("<?xml")
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("decode_sum_encode", "mxfp4", "int8:32:fp16", "[5, 64]", "[8, 32]"))


def test_png_of_one_shape(bench, tmp_path):
    assert bench(*SMALL, "--codec", "mxfp4", "--figure", tmp_path / "rows.png") == 0
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_every_backend_and_codec_is_the_default(bench, tmp_path):
    assert bench("--device", "cpu", "--shape", "2x64", "--repeats", 1, "--json", tmp_path / "rows.json") == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["codec"] for row in rows} == {"none", *bench_codec.CODECS}
    assert "reference" in {row["backend"] for row in rows}
    assert {row["ranks"] for row in rows} == {1, 2, 4}


@pytest.mark.parametrize("arguments", [[], ["codec"]], ids=["bench", "bench codec"])
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *arguments, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "codec" in text
    if arguments:
        assert not [column for column in COLUMNS + CIRCUMSTANCES if column not in text]
        assert "do not show" in text


def test_neither_megatron_nor_transformers_is_needed(tmp_path):
    blocked = dict.fromkeys(("megatron", "transformers", "huggingface_hub", "safetensors", "matplotlib", "torchao"))
    code = (
        f"import sys; sys.modules.update({blocked}); from megatron_comp.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "bench", "codec", *SMALL, "--codec", "mxfp4", "--csv", tmp_path / "rows.csv"]
    environment = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_on_a_gpu(bench, tmp_path):
    arguments = ["--device", "cuda", "--shape", "64x512", "--codec", "mxfp4", "--repeats", 3, "--ranks", 2]
    assert bench(*arguments, "--json", tmp_path / "rows.json") == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["op"] for row in rows[:2]] == ["copy", "empty"]
    assert all(row["times_empty"] > 0 and row["median_ms"] > 0 for row in rows)


# Bad input.


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--codec", "mxfp5"], r"codec 'mxfp5' is neither a preset"),
        (["--shape", "4096"], r"--shape 4096: expected ROWSxHIDDEN"),
        (["--shape", "0x64"], r"--shape 0x64: expected ROWSxHIDDEN, both from 1 to 999999999"),
        (["--backend", "cutlass"], r"--backend cutlass: allowed on cpu are .*reference"),
        (["--tp", "0"], r"--tp 0: at least one"),
        (["--runs", "0"], r"--runs 0: at least one"),
        (["--threads", "0"], r"--threads 0: at least one"),
        (["--csv", "nowhere/rows.csv"], r"--csv nowhere/rows.csv: .*its folder does not exist"),
        (["--json", "."], r"--json \.: not a file"),
        (["--figure", "rows.txt"], r"--figure rows.txt: allowed are names that end in .png, .svg or .pdf"),
    ],
)
def test_bad_input(bench, error_line, arguments, message):
    assert bench(*SMALL, *arguments) == 2
    assert re.search(message, error_line())


def test_a_backend_of_another_device():
    on_gpu = torch.device("cuda")
    assert "native" not in bench_codec._backends(None, on_gpu) and "native" in bench_codec._backends(None, CPU)
    with pytest.raises(ValueError, match=r"--backend native: allowed on cuda are .*reference"):
        bench_codec._backends(["native"], on_gpu)


def test_cuda_where_there_is_none(bench, error_line, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench("--device", "cuda") == 2
    assert re.search(r"--device cuda: torch \S+ sees no CUDA device here", error_line())


def test_a_figure_without_matplotlib(bench, error_line, monkeypatch):
    monkeypatch.setattr(output.importlib.util, "find_spec", lambda name: None)
    assert bench(*SMALL, "--figure", "rows.png") == 2
    assert "--figure needs matplotlib: pip install" in error_line()


def test_several_ranks(bench, error_line, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert bench(*SMALL) == 2
    assert "bench codec runs in one process" in error_line()
