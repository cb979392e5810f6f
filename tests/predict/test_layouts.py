# SPDX-License-Identifier: Apache-2.0
"""Layouts of a model over machines and the advice on them, by hand."""

import csv
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_comp import cli
from megatron_comp.policy import CompressionPolicy
from megatron_comp.predict.advice import QUALITY, best_rows, how_to_check, layouts_advice
from megatron_comp.predict.hardware import Gpu, Interconnect, Shares
from megatron_comp.predict.layouts import layouts_of
from megatron_comp.predict.machines import Machines
from megatron_comp.predict.models import MODELS, Model
from megatron_comp.predict.times import Job, compute_seconds
from megatron_comp.wire.calibration import LEVEL_LINKS, LINKS, Calibration, CodecCost, Link
from megatron_comp.wire.codec import Codec

TINY = Model(layers=3, hidden=64, ffn=128, heads=4, kv_heads=2, head_dim=16, vocab=100)
ALL = Shares(compute=1.0, memory=1.0, codec=1.0, codec_call_us=0.0, layer_us=0.0)
LINK = Interconnect(1e-3, 20, "a million bytes per second", reached=1.0)
INSIDE = Interconnect(1e-2, 2, "ten million", reached=1.0)
MACHINES = Machines(3, 2, LINK, INSIDE, rtt=1e-3)
RESULTS = Path(__file__).parents[2] / "examples/results/2026-11-21_smollm2-135m_tp3_gloo.csv"


def test_decoding_by_hand():
    """One token each after two prompts of 8: flops of two tokens, whose scores and values are of 8; or the weights and
    the keys and values."""
    attention, mlp, head = 2 * 64 * 16 * 6, 3 * 64 * 128, 64 * 100
    job = Job(TINY, 2, 2, 8, phase="decode")
    assert job.shape == (2, 64)
    layer = 2 * 2 * (attention + mlp) + 4 * 2 * 8 * 64
    slow = Gpu(1e-6, 1.0, "a million flops a second")
    assert compute_seconds(job, slow, ALL) == pytest.approx((3 * layer + 2 * 2 * head) / 2 / 1e6)
    cached = 2 * 2 * 8 * 2 * 16
    reads = Gpu(1.0, 1e-3, "a million bytes per second")
    assert compute_seconds(job, reads, ALL) == pytest.approx((3 * (attention + mlp + cached) + head) * 2 / 2 / 1e6)
    assert replace(job, tp=4).cached_values == 2 * cached  # two ranks share one of two key-value heads


def test_a_pipeline_by_hand():
    """Sums inside; two boundaries, and in decoding a third flight brings the token back."""
    job = Job(TINY, 6, 1, 16)
    gpu = Gpu(1.0, 1.0, "", memory_gb=1.0)
    whole, one, pipeline = layouts_of(MACHINES, gpu, ALL, [], job)
    assert [each.name for each in (whole, one, pipeline)] == ["TP=6", "one machine, TP=2", "TP=2, PP=3"]
    job, stock = replace(job, tp=2), CompressionPolicy()
    activation, flight = 16 * 64 * 2, 20e-6 + 0.5e-3
    inside = 6 * (activation / 10e6 + 2 * 2e-6)
    assert one.seconds(job, stock, 0.5)[0] == pytest.approx(0.5 + inside)
    # Two ranks of a stage send the whole activation each, over one card.
    crossings = 2 * (2 * activation / 1e6 + flight)
    assert pipeline.chunks(job) == 1  # a prompt too short to cut
    assert pipeline.seconds(job, stock, 0.5)[0] == pytest.approx(0.5 + inside + crossings)
    token = replace(job, phase="decode")
    logits = 50 * 2 / 10e6 + 2e-6
    of_token = 6 * (128 / 10e6 + 2 * 2e-6) + 2 * (2 * 128 / 1e6 + flight) + flight + logits
    assert pipeline.seconds(token, stock, 0.0)[0] == pytest.approx(of_token)
    few = CompressionPolicy(logits=2)
    assert pipeline.seconds(token, few, 0.0)[0] == pytest.approx(of_token - (50 * 2 - 2 * 6) / 10e6)


def test_a_pipeline_of_chunks_by_hand():
    """1024 tokens in 12 chunks of 86: three stages wait for one another, or for the slower boundary."""
    job, stock = Job(TINY, 2, 1, 1024), CompressionPolicy()
    pipeline = layouts_of(MACHINES, Gpu(1.0, 1.0, "", memory_gb=1.0), ALL, [], replace(job, tp=6))[2]
    activation, flight = 86 * 64 * 2, 20e-6 + 0.5e-3
    sums_of_chunk, crossing = 6 * (activation / 10e6 + 2 * 2e-6), 2 * activation / 1e6
    assert pipeline.chunks(job) == 12
    for compute, slowest in ((3.6, (3.6 / 12 + sums_of_chunk) / 3), (0.0, crossing)):
        stages = compute / 12 + sums_of_chunk
        expected = stages + 2 * (crossing + flight) + 11 * slowest
        assert pipeline.seconds(job, stock, compute)[0] == pytest.approx(expected)


def test_a_pipeline_of_ranks_has_no_sums():
    """Two boundaries of three are inside machines."""
    job, machines = Job(replace(TINY, layers=4), 4, 1, 16), Machines(2, 2, LINK, INSIDE)
    *_, ranks = layouts_of(machines, Gpu(1.0, 1.0, "", memory_gb=1.0), ALL, [], job)
    assert (ranks.name, ranks.tp, ranks.stages, ranks.copies) == ("TP=1, PP=4", 1, 4, 1)
    activation = 16 * 64 * 2
    crossings = 2 * (activation / 10e6 + 2e-6) + activation / 1e6 + 20e-6
    assert ranks.seconds(replace(job, tp=1), CompressionPolicy(), 0.5)[0] == pytest.approx(0.5 + crossings)


def test_memory():
    """Llama-3-70B: 141 GB of weights; of 1024 tokens 0.34 GB of keys and values, which 16 ranks hold twice."""
    job, gpu = Job(MODELS["llama-3-70b"], 16, 1, 1024), Gpu(312, 1935, "", memory_gb=20)
    whole, one, pipeline, _ = layouts_of(Machines(2, 8, LINK, INSIDE), gpu, Shares(), [], job)
    weights, cache = MODELS["llama-3-70b"].weights * 2, 80 * 2 * 1024 * 8 * 128 * 2
    assert whole.memory_bytes(job) == pytest.approx((weights + 2 * cache) / 16)
    assert one.memory_bytes(job) == pytest.approx((weights + cache) / 8)
    assert pipeline.memory_bytes(job) == pytest.approx((weights + cache) / 16)
    assert one.fits(job, gpu) and not one.fits(job, replace(gpu, memory_gb=19.5))  # 17.7 of 18.0 and of 17.55 GB
    small = replace(gpu, memory_gb=19.5)
    names = [each.name for each in layouts_of(Machines(2, 8, LINK, INSIDE), small, Shares(), [], job)]
    assert names == ["TP=16", "TP=8, PP=2", "TP=1, PP=16"]


def row(layout, codec, ttft_ms, decode_ms):
    rounds = 0 if codec == "none" else 1
    algorithm = "gather_sum" if rounds else "all_reduce"
    names = {"layout": layout, "codec": codec, "algorithm": algorithm, "rounds": rounds}
    return names | {"ttft_ms": ttft_ms, "decode_ms": decode_ms, "bits_per_value": 4.25}


def test_when_not_to_use_this_project():
    rows = [row("TP=4", "none", 900, 90), row("TP=4", "mxfp4", 300, 80)]
    of_one = "A prompt and 100 new tokens are fastest with TP=4: 300 ms to the first token (mxfp4 by gather_sum), 80.0"
    assert layouts_advice(rows).startswith(of_one)
    rows += [row("TP=2, PP=2", "none", 270, 95), row("TP=2, PP=2", "mxfp4", 265, 95)]
    said = layouts_advice(rows)
    assert said.startswith(of_one) and "Fastest to the first token: TP=2, PP=2 (stock sums), 270 ms." in said
    rows += [row("one machine, TP=2", "none", 100, 40), row("one machine, TP=2", "mxfp4", 99, 39)]
    said = layouts_advice(rows)
    assert (
        said.startswith("Do not use this project here: the fastest layout compresses nothing.")
        and "one machine, TP=2 (stock sums), 40.0 ms." in said
    )
    rows[-1] = row("one machine, TP=2", "mxfp4", 50, 39)
    assert layouts_advice(rows).startswith("Do not spread tensor parallelism over machines here.")
    assert [each["codec"] for each in best_rows(rows)] == ["none", "mxfp4", "none", "none", "mxfp4"]


def test_quality_figures_are_those_of_the_results():
    with RESULTS.open() as file:
        measured = {(each["codec"], each["algorithm"]): float(each["kl"]) for each in csv.DictReader(file)}
    assert {key: round(measured[key], 4) for key in QUALITY} == QUALITY
    assert set(QUALITY) == set(measured) - {("none", "all_reduce")}


@pytest.mark.parametrize("rounds, name", [(1, "int4:32:fp16:hadamard>int8:32:fp16"), (None, "policy.yaml")])
def test_commands_that_check_are_commands(rounds, name):
    lines = how_to_check(row("TP=4", "mxfp4", 1, 1) | {"codec": name, "rounds": rounds}, 4, 2)
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("  megatron-comp ")]
    assert [each[0] for each in commands] == ["calibrate", "evaluate", "bench"]
    for command in commands:
        cli._parser().parse_args(command)
    assert how_to_check(row("TP=4", "none", 1, 1), 4, 2) == []


QUESTION = ["plan", "--model", "Meta-Llama-3-70B-Instruct", "--gpu", "A100-PCIe", "--machines", "2"]
QUESTION += ["--gpus-per-machine", "8", "--link", "100gbit", "--inside", "pcie4x16-p2p"]


def test_the_question_is_answered_in_one_screen(capsys, tmp_path):
    assert cli.main([*QUESTION, "--json", str(tmp_path / "rows.json")]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 30
    assert out.startswith(
        "Do not spread tensor parallelism over machines here. A prompt and 100 new tokens are fastest"
    )
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    layouts = 13 * ["TP=16"] + 9 * ["one machine, TP=8"] + 9 * ["TP=8, PP=2"] + ["TP=1, PP=16"]
    assert [each["layout"] for each in rows] == layouts
    by_way = {(each["codec"], each["algorithm"]): each for each in rows[:13]}
    sums, message = 160, 1024 * 8192 * 2
    assert by_way["none", "all_reduce"]["mb_across"] == pytest.approx(sums * message * 1.875 / 1e6)
    chosen = by_way["int4:32:fp16:hadamard", "hierarchical"]
    assert chosen["mb_across"] == pytest.approx(sums * message * 0.28125 / 1e6) and chosen["rounds"] == 1
    # Stock: 1.875 of 16.8 MB at 11.25e9 bytes per second, 14 hops of 3 us and 2 of 25.
    stock, compute = rows[0]["ttft_ms"], rows[0]["ttft_ms"] * (1 - rows[0]["share_of_sums"])
    assert stock - compute == pytest.approx(sums * 1e3 * (1.875 * message / 11.25e9 + 92e-6))
    for part in (
        "With TP=16: Compress with int4:32:fp16:hadamard by hierarchical",
        "Decoding:",
        "Logits: each rank receives 240.5 kB of them per token",
        "Fastest per token:",
        "Memory of each GPU",
        "By hierarchical it was not measured: measure it. By gather_sum, which rounds as often, it had a KL of 0.0568",
        "megatron-comp calibrate --tp 16",
        "evaluate --model DIR",
        "bench ttft --model DIR",
    ):
        assert part in out


def test_a_calibration_of_two_levels(capsys, tmp_path):
    """Its links are those of the machines; a policy's row stands beside the codecs'."""
    levels = {name: dict.fromkeys(LEVEL_LINKS, Link(rate, 0.0)) for name, rate in (("inside", 1e9), ("across", 1e6))}
    costs, about = {str(Codec.parse("mxfp4")): CodecCost()}, {"ranks": 4, "device": "cpu", "dtype": "bfloat16"}
    known = Calibration(dict.fromkeys(LINKS, Link(1e6, 0.0)), costs, 0.1, about)
    file, policy, out = tmp_path / "calibration.yaml", tmp_path / "policy.yaml", tmp_path / "rows.json"
    policy.write_text("codec: mxfp4\nalgorithm: hierarchical\nmin_bytes: 0\n")
    command = ["plan", "--model", "llama-3-8b", "--machines", "2", "--gpus-per-machine", "2", "--prompt-tokens", "16"]
    command += ["--compute-ms", "50", "--calibration", str(file), "--codec", "mxfp4", "--policy", str(policy)]
    known.write(file)
    assert cli.main(command) == 2 and "knows no links inside and across" in capsys.readouterr().err
    replace(known, **levels).write(file)
    assert cli.main([*command, "--json", str(out)]) == 0
    assert "hierarchical" in capsys.readouterr().out
    rows = {(each["codec"], each["algorithm"]): each for each in json.loads(out.read_text())["rows"]}
    half = 8 * 4096 * 4.25 / 8
    seconds = 64 * ((8 * 4096 * 2 + 2 * half) / 1e9 + half / 1e6)
    assert rows["mxfp4", "hierarchical"]["ttft_ms"] == pytest.approx(50 + 1e3 * seconds)
    assert rows[str(policy), "hierarchical"]["ttft_ms"] == rows["mxfp4", "hierarchical"]["ttft_ms"]
    assert rows["mxfp4", "hierarchical"]["decode_ms"] is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--machines", "1"], "--machines 1: two are needed"),
        (["--tp", "8"], "--tp 8: 2 machines of 8 have 16 ranks"),
        (["--gpus-per-machine", "7"], "--tp 14: does not divide 64 attention heads"),
        (["--rtt", "1"], "--rtt '1' is no round trip"),
        (["--cards", "0"], "--cards 0: at least one is needed"),
        (["--calibration", "x.yaml"], "--calibration knows the links between machines"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, arguments, message):
    assert cli.main([*QUESTION, *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_what_is_missing_is_told(capsys):
    assert cli.main(QUESTION[:-2]) == 2
    assert "give --inside, the link between GPUs of a machine" in capsys.readouterr().err
    assert cli.main(["plan", "--model", "llama-3-8b", "--gpu", "L4", "--link", "1gbit"]) == 2
    assert "give --tp, the number of ranks, or --machines" in capsys.readouterr().err
    assert (
        cli.main(["plan", "--model", "llama-3-8b", "--tp", "2", "--gpu", "L4", "--link", "1gbit", "--rtt", "1ms"]) == 2
    )
    assert "describe several machines: give --machines" in capsys.readouterr().err


def test_machines_follow_from_gpus_per_machine_or_are_said_to_be_assumed(capsys):
    command = ["plan", "--model", "llama-3-70b", "--gpu", "A100-PCIe", "--link", "100gbit", "--tp", "16"]
    assert cli.main(command) == 0
    assert "Assumed: each of the 16 ranks has its own link of 100gbit" in capsys.readouterr().out
    assert cli.main([*command, "--gpus-per-machine", "8", "--inside", "pcie4x16-p2p"]) == 0
    derived = capsys.readouterr().out
    assert cli.main([*QUESTION]) == 0
    assert derived.split("plan: ")[0] == capsys.readouterr().out.split("plan: ")[0] and "Assumed" not in derived
    assert cli.main([*command, "--gpus-per-machine", "6", "--inside", "pcie4x16-p2p"]) == 2
    assert "--tp 16: does not fill machines of 6 GPUs" in capsys.readouterr().err


def test_errors_of_layouts(capsys, tmp_path):
    """Unshaped rows tell the rest: to it come two levels of sums, or an activation's way from machine to machine."""
    levels = {name: dict.fromkeys(LEVEL_LINKS, Link(rate, 0.0)) for name, rate in (("inside", 1e9), ("across", 1e6))}
    costs, about = {str(Codec.parse("mxfp4")): CodecCost()}, {"ranks": 4, "device": "cpu", "dtype": "bfloat16"}
    known = Calibration(dict.fromkeys(LINKS, Link(1e6, 0.0)), costs, 0.1, about)
    replace(known, **levels).write(tmp_path / "calibration.yaml")
    half, model = 8 * 4096 * 4.25 / 8, MODELS["llama-3-8b"]
    two_levels = 2 * model.layers * ((8 * 4096 * 2 + 2 * half) / 1e9 + half / 1e6)
    row = {"policy": "none", "algorithm": "all_reduce", "prompt_tokens": 16, "speedup_vs_none": 1.0}
    rows = []
    for tp, pp, more in ((4, 1, 2 * model.layers * 1.5 * 16 * 4096 * 2 / 1e6), (2, 2, 16 * 4096 * 2 / 1e6), (1, 1, 0)):
        rows.append(row | {"tp": tp, "pp": pp, "link": "unshaped", "ttft_ms": 50.0})
        rows.append(row | {"tp": tp, "pp": pp, "link": "8mbit", "ttft_ms": 50.0 + 1e3 * more})
    named = {"policy": "mxfp4", "algorithm": "hierarchical", "tp": 4, "pp": 1, "link": "8mbit"}
    rows.append(row | named | {"ttft_ms": 2 * (50 + 1e3 * two_levels)})
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    command = ["plan", "--model", "llama-3-8b", "--machines", "2", "--gpus-per-machine", "2", "--prompt-tokens", "16"]
    command += ["--calibration", str(tmp_path / "calibration.yaml"), "--measured", str(tmp_path / "rows.json")]
    assert cli.main([*command, "--json", str(tmp_path / "out.json")]) == 0
    made = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [each["layout"] for each in made] == ["TP=4", "TP=2, PP=2", "one rank", "TP=4"]
    assert [each["error_pct"] for each in made] == pytest.approx([0, 0, 0, -50], abs=1e-6)
