# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp bench collective`: rows, files, what follows from times, links, and what it refuses.

No test here asserts how fast anything is, but that nothing is faster than its link.
"""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from network import need_network
from ranks import run_ranks

from megatron_comp import cli
from megatron_comp.bench import sums
from megatron_comp.bench.circumstances import DTYPES
from megatron_comp.bench.links import slowest as longest
from megatron_comp.commands import bench_collective, links
from megatron_comp.launcher import network
from megatron_comp.wire.codec import Codec

COLUMNS = [
    *("codec", "algorithm", "ranks", "message_bytes", "bytes_on_wire", "machines", "bytes_across"),
    *("link", "median_ms", "p20_ms", "p80_ms"),
    *("share_of_wire_limit", "speedup_vs_all_reduce", "relative_error", "rows", "hidden", "dtype"),
]
CIRCUMSTANCES = ["device", "torch", "triton", "megatron_comp", "date"]
CPU = torch.device("cpu")


def bench(*arguments):
    return cli.main(["bench", "collective", *map(str, arguments)])


def joined(_rank, _ranks, *arguments):
    return bench(*arguments)


def test_rows_and_files_of_ranks_that_a_launcher_started(tmp_path):
    """Sums over the first two of three ranks, and over all."""
    files = {"json": tmp_path / "rows.json", "csv": tmp_path / "rows.csv", "figure": tmp_path / "rows.svg"}
    pair = "int8:32:fp16>int4:32:fp16"
    arguments = ["--tp", 2, "--tp", 3, "--shape", "6x64", "--runs", 2, "--codec", "mxfp4", "--codec", pair]
    arguments += [f"--{option}={file}" for option, file in files.items()]
    assert run_ranks(joined, 3, *arguments, init=False) == [0] * 3

    rows = json.loads(files["json"].read_text())["rows"]
    assert all(list(row) == COLUMNS for row in rows)
    expected = []
    for ranks in (2, 3):
        # A row of 64 has two blocks: 32 bytes and 2 scales in mxfp4; sections are padded to 16 bytes.
        mxfp4 = {6: 192 + 16, 3: 96 + 16, 2: 64 + 16}
        int8, int4 = {3: 192 + 16, 2: 128 + 16}, {3: 96 + 16, 2: 64 + 16}
        part, others = 6 // ranks, ranks - 1
        expected += [
            ("none", "all_reduce", ranks, 2 * others * 768 // ranks),
            ("bf16", "gather_sum", ranks, others * 768),
            ("mxfp4", "gather_sum", ranks, others * mxfp4[6]),
            ("mxfp4", "two_step", ranks, others * 2 * mxfp4[part]),
            (pair, "two_step", ranks, others * (int8[part] + int4[part])),
        ]
    assert [tuple(row[key] for key in ("codec", "algorithm", "ranks", "bytes_on_wire")) for row in rows] == expected
    stock = {row["ranks"]: row for row in rows if row["codec"] == "none"}
    for row in rows:
        assert (row["message_bytes"], row["link"], row["dtype"]) == (768, "local", "bfloat16")
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["share_of_wire_limit"] is None
        assert row["speedup_vs_all_reduce"] == pytest.approx(stock[row["ranks"]]["median_ms"] / row["median_ms"])

    with files["csv"].open() as file:
        lines = list(csv.DictReader(file))
    assert [list(line) for line in lines] == [COLUMNS + CIRCUMSTANCES] * len(rows)
    assert [float(line["median_ms"]) for line in lines] == [row["median_ms"] for row in rows]
    assert files["figure"].read_text().startswith("<?xml")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_errors_are_those_of_the_sum(dtype):
    """Of what rank 0 would get from three ranks, worked out in one process."""
    rows = run_ranks(measured, 3, dtype)[0]
    partials = [sums.partial_sum(rank, (8, 64), DTYPES[dtype], CPU) for rank in range(3)]
    exact = sum(x.double() for x in partials)
    codec = Codec.parse("mxfp4")
    decoded = sum(codec.decode(codec.encode(x), x.shape, torch.float32) for x in partials).to(partials[0].dtype)
    error = float((decoded.double() - exact).norm() / exact.norm())
    by_name = {(row["codec"], row["algorithm"]): row["relative_error"] for row in rows}
    assert by_name["mxfp4", "gather_sum"] == pytest.approx(error, rel=1e-5)
    assert by_name["mxfp4", "two_step"] > 1.2 * error
    # bf16 rounds to 8 bits, fp32 to 24; the all-gather is in 16 bits either way.
    assert 1e-4 < by_name["bf16", "gather_sum"] < 4e-3
    assert (1e-4 if dtype == "bf16" else 0) < by_name["none", "all_reduce"] < (4e-3 if dtype == "bf16" else 1e-6)


def measured(_rank, ranks, dtype):
    setting = bench_collective.SumTiming(
        {"mxfp4": Codec.parse("mxfp4")},
        ["gather_sum", "two_step"],
        [ranks],
        [(8, 64)],
        DTYPES[dtype],
        1,
    )
    return sums.measure(setting, (8, 64), ranks, None, CPU)


def test_ranks_with_different_sums_are_refused():
    for rank, error in enumerate(run_ranks(own_share_exact, 2)):
        assert error == "mxfp4, gather_sum: the ranks hold different sums", rank


def own_share_exact(rank, ranks):
    """As if a rank kept its own share exact, which shipped as a bug in two public systems."""

    def harmful(x, codec, *_, **__):
        messages = [codec.encode(sums.partial_sum(other, x.shape, x.dtype, CPU)) for other in range(ranks)]
        decoded = [codec.decode(message, x.shape, torch.float32) for message in messages]
        decoded[rank] = x.float()
        return sum(decoded).to(x.dtype)

    sums.all_reduce = harmful
    try:
        measured(rank, ranks, "bf16")
    except RuntimeError as error:
        return str(error)


def test_what_is_derived_from_times(monkeypatch):
    monkeypatch.setenv("MEGATRON_COMP_LINK", "100mbit")
    monkeypatch.setenv("WORLD_SIZE", "2")
    entries = [
        sums.Entry("none", "all_reduce", 1_500_000, 1_000_000, None),
        sums.Entry("mxfp4", "gather_sum", 400_000, 250_000, None),
    ]
    times = [(0.1, 0.1, 0.1), (0.03, 0.025, 0.02)]
    stock, mxfp4 = sums._rows(entries, times, [0.0, 0.1], torch.zeros(4, 64), 4, 2)
    assert stock["share_of_wire_limit"] == pytest.approx(0.8)  # a megabyte takes 80 ms
    assert mxfp4["share_of_wire_limit"] == pytest.approx(0.8) and mxfp4["median_ms"] == pytest.approx(25)
    assert stock["speedup_vs_all_reduce"] == 1 and mxfp4["speedup_vs_all_reduce"] == pytest.approx(4)
    assert stock["link"] == "100mbit"


def test_a_call_lasts_until_the_last_rank_is_done():
    assert run_ranks(slowest, 2) == [[[2.0, 5.0], [3.0, 4.0]]] * 2


def slowest(rank, _ranks):
    return longest([[[2.0, 1.0], [3.0, 4.0]], [[1.0, 5.0], [0.0, 0.0]]][rank], CPU)


def test_the_clock_starts_when_all_ranks_are_ready():
    """Rank 1 comes half a second late; only its own call takes time."""
    late, in_time = run_ranks(seconds_after_a_wait, 2)
    assert late < 0.3 and in_time < 0.3


def seconds_after_a_wait(rank, _ranks):
    import time

    entry = sums.Entry("none", "all_reduce", 0, 0, dist.barrier, lambda: time.sleep(0.5 * rank))
    return sums._seconds(entry, CPU)


@pytest.mark.slow_network
def test_on_a_link_of_that_rate(command, tmp_path):
    """512 KB, of which the first 256 KB go at once."""
    need_network()
    done = command(
        *("bench", "collective", "--link", "40mbit", "--shape", "128x4096", "--repeats", 2, "--dtype", "fp32"),
        *("--codec", "int8:32:fp16", "--algorithm", "gather_sum", "--json", tmp_path / "rows.json"),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["codec"] for row in rows] == ["none", "bf16", "int8:32:fp16"]
    for row in rows:
        least_ms = (row["bytes_on_wire"] - network.burst_bytes(40e6)) / 40e6 * 8e3
        assert row["link"] == "40mbit" and row["median_ms"] > least_ms > 0
        assert row["share_of_wire_limit"] == pytest.approx(row["bytes_on_wire"] * 8 / 40e3 / row["median_ms"])
    assert done.stdout.count("bench collective:") == 1 and "40mbit" in done.stdout


@pytest.mark.slow_network
def test_machines_of_several_ranks(command, tmp_path):
    """All algorithms, and of each what the busiest machine receives, from the formulas by hand."""
    need_network()
    done = command(
        *("bench", "collective", "--link", "unshaped", "--rtt", "1ms", "--machines", 2, "--ranks", 4, "--repeats", 1),
        *("--shape", "128x64", "--codec", "mxfp4", "--json", tmp_path / "rows.json"),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    message, tensor = 128 * 34, 128 * 64 * 2
    assert [(row["codec"], row["algorithm"], row["bytes_across"]) for row in rows] == [
        ("none", "all_reduce", 1.5 * tensor),
        ("bf16", "gather_sum", 3 * tensor),
        ("mxfp4", "gather_sum", 3 * message),
        ("mxfp4", "two_step", (1 + 0.75) * message),
        ("mxfp4", "hierarchical", message),
    ]
    assert {(row["link"], row["machines"]) for row in rows} == {("unshaped@1ms", 2)}
    assert all(row["median_ms"] > 1 for row in rows)


def test_one_link_after_another(monkeypatch, tmp_path):
    """Rows of all links go into the files after each, so that one that fails takes none with it."""
    started = []

    def start(count, command, its_network, **environment):
        link = its_network.environment[network.LINK]
        started.append((count, link, command[-1]))
        if link == "3gbit":
            return 4
        content = {"rows": [{"link": link, "ms": len(started)}], "circumstances": {"device": "this"}}
        (file,) = environment.values()
        Path(file).write_text(json.dumps(content))
        return 0

    monkeypatch.setattr(links.ranks, "start", start)
    args = SimpleNamespace(link=["1gbit", "2gbit", "3gbit", "4gbit"], machines=None, rtt="0")
    reports = []
    assert links.start(args, ["an argument"], [links.Start(2)], lambda *said: reports.append(said[1:])) == 4
    assert started == [(2, f"{number}gbit", "an argument") for number in (1, 2, 3)]
    first, second = {"link": "1gbit", "ms": 1}, {"link": "2gbit", "ms": 2}
    assert [(list(rows), new) for rows, new, _ in reports] == [([first, second], [first]), ([first, second], [second])]
    assert [said[2] for said in reports] == [{"device": "this"}] * 2


def test_several_starts_over_one_link(monkeypatch):
    """Fewer ranks than fill the machines fill one after another."""
    started = []

    def start(count, command, its_network, **environment):
        started.append((its_network.machines, command[-2:], its_network.environment[network.LINK]))
        (file,) = environment.values()
        Path(file).write_text(json.dumps({"rows": [], "circumstances": {}}))
        return 0

    monkeypatch.setattr(links.ranks, "start", start)
    args = SimpleNamespace(link=["1gbit,2gbit"], machines=2, rtt="0")
    starts = [links.Start(4), links.Start(3, ["--tp", "3"]), links.Start(2, ["--tp", "2"]), links.Start(1)]
    assert links.start(args, ["its", "argument"], starts, lambda *_: None) == 0
    assert started == [
        ((2, 2), ["its", "argument"], "1gbit,2gbit"),
        ((2, 1), ["--tp", "3"], "1gbit,2gbit"),
        ((2,), ["--tp", "2"], "1gbit"),
        ((1,), ["its", "argument"], "1gbit"),
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--codec", "mxfp5"], r"codec 'mxfp5' is neither a preset"),
        (["--shape", "4096"], r"--shape 4096: expected ROWSxHIDDEN"),
        (["--tp", "1"], r"--tp 1: allowed are 2 and more"),
        (["--runs", "0"], r"--runs 0: at least one"),
        (["--timeout", "0"], r"--timeout 0.0: allowed are seconds above 0"),
        (["--link", "fast"], r"--link 'fast' is no rate of a link: allowed are"),
        (["--link", "1gbit", "--rtt", "1"], r"--rtt '1' is no round trip: allowed are"),
        (["--machines", "2"], r"--machines and --rtt are of the network that --link makes"),
        (["--rtt", "1ms"], r"--machines and --rtt are of the network that --link makes"),
        (["--link", "1gbit", "--machines", "3"], r"--machines 3: 2 ranks cannot be shared out evenly"),
        (["--codec", "mxfp4>mxfp8", "--algorithm", "gather_sum"], r"--codec mxfp4>mxfp8: gather_sum has one phase"),
        (["--csv", "nowhere/rows.csv"], r"--csv nowhere/rows.csv: .*its folder does not exist"),
        (["--figure", "rows.txt"], r"--figure rows.txt: allowed are names that end in"),
    ],
)
def test_bad_input(monkeypatch, error_line, arguments, message):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(links.ranks, "start", lambda *_, **__: pytest.fail("ranks were started"))
    assert bench(*arguments) == 2
    assert re.search(message, error_line())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--link", "100mbit"], r"--link starts ranks of its own"),
        (["--tp", "3"], r"--tp 3: allowed are 2 to 2, which were started"),
    ],
)
def test_what_ranks_that_stand_cannot_do(monkeypatch, capsys, arguments, message):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", **place}.items():
        monkeypatch.setenv(name, value)
    assert bench(*arguments, "--timeout", "1") == 2  # so long it waits for the other rank, to tell it
    assert re.search(f"megatron-comp: error on rank 0: {message}", capsys.readouterr().err)


@pytest.mark.parametrize(
    "name, columns", [("collective", COLUMNS), ("ttft", ["ttft_ms", "speedup_vs_none", "bytes_per_rank"])]
)
def test_help(capsys, name, columns):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert not [column for column in [*columns, *CIRCUMSTANCES] if column not in text]
    assert all(words in text for words in ("do not show", "launch/slow_network.sh", "OMP_NUM_THREADS"))
