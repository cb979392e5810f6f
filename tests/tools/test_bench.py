"""`megatron-comp bench codec` and launch/gpu_check.sh: rows, files, the refusal of wrong bytes, how time is counted.

No test here asserts how long anything takes.
"""

import csv
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_comp import cli
from megatron_comp.tools.bench import codec as bench_codec
from megatron_comp.tools.bench import equality, measure, peers, timing
from megatron_comp.wire import backends, reference
from megatron_comp.wire.codec import Codec

REPO = Path(__file__).parents[2]
COLUMNS = [
    *("op", "codec", "backend", "rows", "hidden", "dtype", "ranks", "bytes_moved", "median_ms", "p20_ms", "p80_ms"),
    *("gb_per_s", "times_copy", "share_of_copy", "times_empty"),
]
CPU = torch.device("cpu")
CIRCUMSTANCES = ["device", "torch", "triton", "megatron_comp", "date"]
SMALL = ["--device", "cpu", "--backend", "reference", "--shape", "4x64", "--repeats", "2", "--ranks", "2"]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(cli.ranks, "start", lambda *_: pytest.fail("ranks were started"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bench(*arguments):
    return cli.main(["bench", "codec", *map(str, arguments)])


def error_line(capsys):
    errors = capsys.readouterr().err
    (line,) = [line for line in errors.splitlines() if line.startswith("megatron-comp: error")]
    assert "Traceback" not in errors
    return line


# Rows and files.


def test_rows_and_files(capsys, tmp_path):
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


def test_png_of_one_shape(tmp_path):
    assert bench(*SMALL, "--codec", "mxfp4", "--figure", tmp_path / "rows.png") == 0
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_every_backend_and_codec_is_the_default(tmp_path):
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


# Wrong bytes.


def flips_a_bit(out, _before):
    out[70] ^= 4


def skips_the_end(out, before):
    out[-16:] = before[-16:]


@pytest.mark.parametrize("harm, first", [(flips_a_bit, "70"), (skips_the_end, r"\d+")])
@pytest.mark.parametrize("op", ["encode", "decode_sum", "decode_sum_encode"])
def test_a_wrong_byte_is_refused(capsys, monkeypatch, tmp_path, op, harm, first):
    def harmful(*arguments):
        out = arguments[-1].view(torch.uint8).view(-1)
        before = out.clone()
        assert before.eq(0xFF).all()  # else what is not written may be right by chance
        getattr(reference, op)(*arguments)
        harm(out, before)

    functions = {name: getattr(reference, name) for name in ("encode", "decode_sum", "decode_sum_encode")}
    wrong = SimpleNamespace(**(functions | {op: harmful}))
    monkeypatch.setattr(backends, "available", lambda _: {"reference": reference, "wrong": wrong})
    monkeypatch.setattr(timing.WallClock, "round", lambda *_: pytest.fail("something was timed"))
    arguments = [*SMALL, "--backend", "wrong", "--codec", "mxfp8", "--csv", tmp_path / "rows.csv"]
    assert bench(*arguments) == 1
    line = error_line(capsys)
    expected = rf"fp8_e4m3:32:e8m0, {op} .*'wrong'.* byte is {first}, 0x\w\w where the reference has 0x\w\w"
    assert re.search(expected, line), line
    assert not (tmp_path / "rows.csv").exists()


class StaleOnReplay:
    """Right when called, but what a CUDA graph of it holds is the first answer, whatever the input becomes."""

    def __init__(self):
        self.first = None

    def encode(self, x, fmt, out):
        if self.first is None:
            reference.encode(x, fmt, out)
            self.first = out.clone()
        out.copy_(self.first)


@pytest.mark.gpu
@needs_gpu
def test_a_graph_that_ignores_its_input_is_refused():
    device, partials = torch.device("cuda"), torch.randn(2, 8, 64)
    truth = equality.Truth.of(Codec.parse("mxfp4"), partials)
    equality.check("reference", reference, "encode", 1, truth, device)
    with pytest.raises(equality.WrongBytes, match="replayed in a CUDA graph"):
        equality.check("stale", StaleOnReplay(), "encode", 1, truth, device)


@pytest.mark.gpu
@needs_gpu
def test_rows_on_a_gpu(tmp_path):
    arguments = ["--device", "cuda", "--shape", "64x512", "--codec", "mxfp4", "--repeats", 3, "--ranks", 2]
    assert bench(*arguments, "--json", tmp_path / "rows.json") == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["op"] for row in rows[:2]] == ["copy", "empty"]
    assert all(row["times_empty"] > 0 and row["median_ms"] > 0 for row in rows)


# Time, on clocks that the test holds.


class FakeTime:
    """Seconds that pass only when work is done."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


def test_the_wall_clock(monkeypatch):
    fake, calls = FakeTime(), []
    monkeypatch.setattr(timing, "time", fake)

    def work(name, seconds):
        def call(turn):
            calls.append((name, turn))
            fake.now += seconds

        return call

    clock = timing.WallClock(buffers=3)
    prepared = [clock.prepare(work("a", 0.25)), clock.prepare(work("b", 2.0))]
    rounds = [clock.round(prepared) for _ in range(2)]
    assert rounds == [[0.25, 2.0]] * 2
    # All in turn, and nobody on the buffers of whoever was just before.
    assert calls == list(zip("ababab", (0, 1, 2, 0, 1, 2)))


def test_the_graph_clock(monkeypatch):
    """Events on a device that works off what is queued; the host counts for nothing, nor does the first replay."""
    device = FakeTime()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = device.now

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    class Graph:
        def __init__(self, seconds):
            self.seconds, self.replays = seconds, 0

        def replay(self):
            self.replays += 1
            device.now += self.seconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    clock, graphs = timing.GraphClock(buffers=2, calls=8), [Graph(1.0), Graph(4.0)]
    assert clock.round(graphs) == [0.125, 0.5]
    assert [graph.replays for graph in graphs] == [2, 1]


def test_buffers_exceed_the_cache(monkeypatch):
    megabytes = 1 << 20
    assert timing.clock_for(CPU, 8 * megabytes).buffers * 8 >= 128
    assert timing.clock_for(CPU, 1000 * megabytes).buffers == 2
    properties = SimpleNamespace(L2_cache_size=50 * megabytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    for tensor_bytes in (64 << 10, 8 * megabytes, 256 * megabytes):
        clock = timing.clock_for(torch.device("cuda"), tensor_bytes)
        # The sum of 2 messages of 4 bits and their re-encoding touch 3/4 of a bf16 tensor.
        assert clock.buffers * tensor_bytes * 3 / 4 > 2 * 50 * megabytes
        assert clock.calls >= clock.buffers


def test_percentiles():
    seconds = [value / 1e3 for value in (50, 10, 30, 20, 40, 60)]
    assert timing.percentiles(seconds) == pytest.approx({"median_ms": 35, "p20_ms": 20, "p80_ms": 50})


def test_what_is_derived_from_times():
    def entry(op, bytes_moved):
        return measure.Entry(op, "mxfp4", "reference", 1, bytes_moved, call=None)

    setting = SimpleNamespace(dtype="bf16")
    entries = [entry("copy", 8_000_000), entry("empty", 0), entry("encode", 5_000_000)]
    copy, _, encode = measure._rows(entries, [(0.002, 0.002), (0.0005,) * 2, (0.004, 0.006)], (4, 64), setting)
    assert copy["gb_per_s"] == pytest.approx(4) and copy["times_copy"] == copy["share_of_copy"] == 1
    assert encode["median_ms"] == pytest.approx(5)
    assert encode["gb_per_s"] == pytest.approx(1)
    assert encode["times_copy"] == pytest.approx(2.5)
    assert encode["share_of_copy"] == pytest.approx(0.25)
    assert encode["times_empty"] == pytest.approx(10)
    copy, encode = measure._rows([entries[0], entries[2]], [(0.002,), (0.004,)], (4, 64), setting)
    assert copy["times_empty"] is encode["times_empty"] is None


# Peers.


def test_the_eager_peer_passes_the_check_of_bytes():
    pytest.importorskip("torchao")
    truth = equality.Truth.of(Codec.parse("mxfp4"), torch.randn(2, 8, 64))
    equality.check("torchao", peers.Torchao(CPU), "encode", 1, truth, CPU)


def test_the_compiled_peer_passes_the_check_of_bytes(monkeypatch):
    """Without the compiler, whose start would take most of this file's time."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    peer = peers.TorchCompile(CPU)
    for name, (op, ranks) in itertools.product(("mxfp4", "mxfp8"), (("encode", 1), ("decode_sum", 3))):
        truth = equality.Truth.of(Codec.parse(name), torch.randn(3, 8, 64, dtype=torch.bfloat16))
        equality.check("torch.compile", peer, op, ranks, truth, CPU)


def test_peers_that_cannot_run_give_a_line_and_no_row(capsys, monkeypatch, tmp_path):
    class Missing:
        def __init__(self, _device):
            import a_package_that_is_missing  # noqa: F401

    class Wrong:
        def __init__(self, _device):
            pass

        def encode(self, x, fmt, out):
            out.fill_(1)

    monkeypatch.setattr(peers, "PEERS", {"missing": Missing, "wrong": Wrong})
    arguments = [*SMALL, "--peers", "--codec", "mxfp4", "--codec", "nvfp4", "--json", tmp_path / "rows.json"]
    assert bench(*arguments) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["backend"] for row in rows} == {"torch", "reference"}
    errors = capsys.readouterr().err
    assert "no row for peer missing: ModuleNotFoundError: No module named 'a_package_that_is_missing'" in errors
    assert "no row for peer wrong, encode mxfp4: WrongBytes:" in errors
    assert len(errors.splitlines()) == 2


# Bad input.


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--codec", "mxfp5"], r"codec 'mxfp5' is neither a preset"),
        (["--shape", "4096"], r"--shape 4096: expected ROWSxHIDDEN"),
        (["--shape", "0x64"], r"--shape 0x64: expected ROWSxHIDDEN, both at least 1"),
        (["--backend", "cutlass"], r"--backend cutlass: allowed on cpu are .*reference"),
        (["--ranks", "0"], r"--ranks 0: at least one"),
        (["--repeats", "0"], r"--repeats 0: at least one"),
        (["--threads", "0"], r"--threads 0: at least one"),
        (["--csv", "nowhere/rows.csv"], r"--csv nowhere/rows.csv: .*its folder does not exist"),
        (["--json", "."], r"--json \.: not a file"),
        (["--figure", "rows.txt"], r"--figure rows.txt: allowed are names that end in .png or .svg"),
    ],
)
def test_bad_input(capsys, arguments, message):
    assert bench(*SMALL, *arguments) == 2
    assert re.search(message, error_line(capsys))


def test_a_backend_of_another_device():
    on_gpu = torch.device("cuda")
    assert "native" not in bench_codec._backends(None, on_gpu) and "native" in bench_codec._backends(None, CPU)
    with pytest.raises(ValueError, match=r"--backend native: allowed on cuda are .*reference"):
        bench_codec._backends(["native"], on_gpu)


def test_cuda_where_there_is_none(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench("--device", "cuda") == 2
    assert re.search(r"--device cuda: torch \S+ sees no CUDA device here", error_line(capsys))


def test_a_figure_without_matplotlib(capsys, monkeypatch):
    monkeypatch.setattr(bench_codec.importlib.util, "find_spec", lambda name: None)
    assert bench(*SMALL, "--figure", "rows.png") == 2
    assert "--figure needs matplotlib: pip install" in error_line(capsys)


def test_several_ranks(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert bench(*SMALL) == 2
    assert "bench codec runs in one process" in error_line(capsys)


# launch/gpu_check.sh


@pytest.fixture
def gpu_check(tmp_path):
    """gpu_check(gpus, **environment): runs the script where nvidia-smi lists these, with this Python and no set-up."""

    def run(gpus, *arguments, **environment):
        tool = tmp_path / "bin" / "nvidia-smi"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/sh\nprintf '{gpus}'\n")
        tool.chmod(0o755)
        environment = {**os.environ, "SETUP": "0", "PYTHON": sys.executable, "OUT": f"{tmp_path}/out", **environment}
        environment["PATH"] = f"{tool.parent}:{environment['PATH']}"
        command = ["bash", REPO / "launch" / "gpu_check.sh", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    return run


def test_gpu_check_dry_run(gpu_check, tmp_path):
    done = gpu_check("", "--repeats", "5", DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()
    (tests,) = re.findall(r"-m pytest -q -m gpu (.*)", done.stdout)
    assert "tests/wire/test_gpu.py" in tests.split() and "tests/tools/test_bench.py" in tests.split()
    (options,) = re.findall(r"-m megatron_comp\.cli (.*)", done.stdout)
    args = cli._parser().parse_args(shlex.split(options))
    bytes_of = [2 * rows * hidden for rows, hidden in map(bench_codec._shape, args.shape)]
    assert bytes_of == [8 << 20, 64 << 10, 1 << 20, 16 << 20, 64 << 20, 256 << 20]
    assert all(Codec.parse(name) for name in args.codec)
    assert (args.device, args.ranks, args.peers, args.repeats) == ("cuda", [2, 8], True, 5)
    assert "reference" not in args.backend


def test_gpu_check_without_a_gpu(gpu_check, tmp_path):
    done = gpu_check("")
    assert done.returncode != 0
    assert done.stderr.splitlines() == ["gpu_check: there is no GPU here: nvidia-smi is missing or lists none"]
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_gpu_check_where_torch_sees_none(gpu_check, tmp_path):
    done = gpu_check("GPU 0: one\\n")
    assert done.returncode != 0
    assert re.search(r"^gpu_check: torch \S+ sees no CUDA device$", (tmp_path / "out" / "log.txt").read_text(), re.M)
    assert "[3/4]" not in done.stdout
