# SPDX-License-Identifier: Apache-2.0
"""`megatron-comp plan`: its arithmetic by hand, its advice and its messages."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from megatron_comp import cli
from megatron_comp.policy import CompressionPolicy
from megatron_comp.predict.advice import advice
from megatron_comp.predict.calibrations import calibration_of
from megatron_comp.predict.hardware import Gpu, Interconnect, Shares, assumed_calibration, wire_of
from megatron_comp.predict.models import MODELS, Model, from_config, load
from megatron_comp.predict.times import Job, compute_seconds, sums
from megatron_comp.wire.calibration import LINKS, Calibration, CodecCost, Link
from megatron_comp.wire.codec import Codec

TINY = Model(layers=3, hidden=64, ffn=128, heads=4, kv_heads=2, head_dim=16, vocab=100)
EASY = Gpu(tflops=1e-6, memory_gb_s=1e-3, source="a million flops and bytes per second")
ALL = Shares(compute=1.0, memory=1.0, codec=1.0, codec_call_us=0.0, layer_us=0.0)


@pytest.mark.parametrize(
    "name, billions",
    [("llama-2-7b", 6.74), ("llama-2-13b", 13.02), ("llama-2-70b", 68.98), ("llama-3.1-8b", 8.03),
     ("llama-3.1-70b", 70.55), ("mixtral-8x7b", 46.70)],
)  # fmt: skip
def test_rows_have_the_parameters_that_their_makers_state(name, billions):
    model = MODELS[name]
    layer = model.attention_weights + max(model.experts, 1) * model.mlp_weights
    assert (model.layers * layer + 2 * model.hidden * model.vocab) / 1e9 == pytest.approx(billions, rel=0.002)


def test_a_real_config(smollm2):
    model = load(str(smollm2))
    assert model == Model(30, 576, 1536, 9, 3, 64, 49152) == load(str(smollm2 / "config.json"))


def test_mixtral_configs_have_experts():
    config = {
        "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 50,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    }  # fmt: skip
    assert from_config(config, "x") == Model(2, 64, 96, 4, 4, 16, 50, experts=8, active=2)
    assert from_config(config, "x").sites == ("attention", "experts")


def test_compute_by_hand():
    """Two prompts of 8 tokens on 2 ranks: flops bind. One token: the weights' bytes do."""
    attention, mlp, head = 2 * 64 * 16 * 6, 3 * 64 * 128, 64 * 100
    layer = 2 * 16 * (attention + mlp) + 2 * 16 * 8 * 64
    assert compute_seconds(Job(TINY, 2, 2, 8), EASY, ALL) == pytest.approx((3 * layer + 2 * 2 * head) / 2 / 1e6)
    one = 2 * (3 * (attention + mlp) + head) / 2 / 1e6
    assert compute_seconds(Job(TINY, 2, 1, 1), Gpu(1.0, 1e-3, ""), ALL) == pytest.approx(one)
    slow_to_start = Shares(1.0, 1.0, 1.0, 0.0, layer_us=1e6)
    assert compute_seconds(Job(TINY, 2, 1, 1), Gpu(1.0, 1.0, ""), slow_to_start) == pytest.approx(3, rel=1e-3)


def test_a_token_takes_its_active_experts_and_a_batch_reads_all():
    mixture = Model(3, 64, 128, 4, 2, 16, 100, experts=8, active=2)
    dense_twice = Model(3, 64, 256, 4, 2, 16, 100)
    job, twice = Job(mixture, 2, 2, 64), Job(dense_twice, 2, 2, 64)
    assert compute_seconds(job, EASY, ALL) == pytest.approx(compute_seconds(twice, EASY, ALL))
    reads = Gpu(1e3, 1e-3, "")
    more = compute_seconds(job, reads, ALL) - compute_seconds(twice, reads, ALL)
    assert more == pytest.approx(3 * 6 * 3 * 64 * 128 * 2 / 2 / 1e6, rel=1e-3)


CALIBRATION = Calibration(
    dict.fromkeys(LINKS, Link(1e6, 0.0)),
    {str(Codec.parse("mxfp4")): CodecCost()},
    0.1,
    {"ranks": 2, "device": "cpu"},
)


def test_sums_by_hand():
    job = Job(TINY, 2, 1, 16)
    stock, message = 16 * 64 * 2 / 1e6, (16 * 32 + 16 * 2) / 1e6
    assert sums(job, CompressionPolicy(), CALIBRATION).seconds == pytest.approx(6 * stock)
    words = {"codec": "mxfp4", "algorithm": "gather_sum", "min_bytes": 0}
    made = sums(job, CompressionPolicy(**words), CALIBRATION)
    assert (made.seconds, made.compressed) == (pytest.approx(6 * message), 6)
    layers = {0: "none", 1: {"attention": "drop"}}
    made = sums(job, CompressionPolicy(**words, layers=layers), CALIBRATION)
    assert (made.compressed, made.dropped) == (3, 1)
    assert made.seconds == pytest.approx(2 * stock + 3 * message)
    assert sums(Job(TINY, 1, 1, 16), CompressionPolicy(**words), CALIBRATION).seconds == 0


def test_sums_that_layers_overlap_by_hand():
    """On a CPU, in eight parts: codec and an eighth of the wire, as long as MLPs compute no less than that hides."""
    model, cost = Model(3, 1024, 2048, 16, 16, 64, 100), CodecCost(0.0, 1e-9, 0.0, 1e-9)
    known = replace(CALIBRATION, codecs={str(Codec.parse("mxfp4")): cost})
    job, values, message = Job(model, 2, 1, 2048), 2048 * 1024, 2048 * (512 + 32)
    policy = CompressionPolicy(codec="mxfp4", algorithm="gather_sum", min_bytes=0)
    wire, work = message / 1e6, values * 3e-9
    hidden_by_chunks = work * (1 - 1 / 4)  # of 256 KiB; codec and wire hide each other
    alone = 6 * (wire + work - hidden_by_chunks)
    assert sums(job, policy, known).seconds == pytest.approx(alone)
    assert sums(job, policy, known, 100.0).seconds == pytest.approx(6 * (work + wire / 8))
    share = 3 * 2048 / (3 * 2048 + 4 * 1024)
    assert sums(job, policy, known, 1.0).seconds == pytest.approx(alone - share)
    for other in (replace(job, model=replace(model, experts=8, active=2)), job):
        there = known if other.model.experts else replace(known, measured={"ranks": 2, "device": "cuda"})
        assert sums(other, policy, there, 100.0).seconds == sums(other, policy, there).seconds


def test_a_policy_is_gated_by_the_prediction():
    fast = assumed_calibration(
        Gpu(100, 1e-3, "codecs that crawl"), wire_of("nvlink4"), Shares(), [Codec.parse("mxfp4")], 2
    )
    job = Job(TINY, 2, 1, 16)
    assert sums(job, CompressionPolicy(codec="mxfp4"), fast).compressed == 0
    assert sums(job, CompressionPolicy(codec="mxfp4"), CALIBRATION).compressed == 6


@pytest.mark.parametrize("link, gb_s", [("100mbit", 0.0125), ("2.5gbit", 0.3125), ("pcie4x16", 32)])
def test_links_by_name_and_by_rate(link, gb_s):
    assert wire_of(link).gb_s == pytest.approx(gb_s)


def run(capsys, *arguments):
    assert cli.main(["plan", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_slow_links_should_compress_and_fast_ones_not(capsys, tmp_path):
    out = run(capsys, "--model", "llama-2-70b", "--tp", 8, "--gpu", "l4", "--link", "pcie4x16")
    # mxfp4 takes 496 ms, this 508: within 5 %, the codec that rounds less is recommended.
    assert "Compress with int4:32:fp16:hadamard by two_step" in out
    out = run(capsys, "--model", "llama-2-7b", "--tp", 2, "--prompt-tokens", 64, "--gpu", "H100", "--link", "nvlink4")
    assert "Leave compression off" in out
    policy, rows = tmp_path / "policy.yaml", tmp_path / "rows.json"
    policy.write_text("codec: int8:32:fp16\nlayers: {3-9: {attention: drop}}\n")
    where = ("--gpu", "A100", "--link", "10gbit", "--policy", policy, "--codec", "mxfp4>mxfp8", "--json", rows)
    run(capsys, "--model", "llama-2-7b", "--tp", 4, *where)
    made = json.loads(rows.read_text())["rows"]
    assert [row["codec"] for row in made] == ["none", "mxfp4>mxfp8", str(policy)]
    assert (made[2]["dropped"], made[2]["compressed"]) == (7, 57)


def test_what_a_predictor_adds(capsys, tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text("codec: mxfp4\npredictor: p.safetensors\n")
    sums = {f"layers.{layer}.{site}.down" for layer in range(32) for site in ("attention", "mlp")}
    weights = {name: torch.zeros(4096, 64, dtype=torch.uint8) for name in sums}
    save_file(weights, tmp_path / "p.safetensors", metadata={"tensor_parallel": "4"})
    where = ("--gpu", "A100", "--link", "10gbit", "--policy", policy)
    # 64 x 3 x 64 x 4096 products, of 32 x (4 x 4096 x 4096 + 3 x 4096 x 11008) / 4
    out = run(capsys, "--model", "llama-2-7b", "--tp", 4, *where)
    assert "64 of 64 sums; adds 101.7 MB of weights to each rank, and 3.1% to its layers' multiplications" in out
    weights |= {
        f"layers.{layer}.attention.response_down": torch.zeros(4096, 64, dtype=torch.uint8) for layer in range(32)
    }
    save_file(weights, tmp_path / "p.safetensors", metadata={"tensor_parallel": "4"})
    policy.write_text("codec: mxfp4\npredictor: p.safetensors\nlayers: {0-15: {attention: drop}}\n")
    out = run(capsys, "--model", "llama-2-7b", "--tp", 4, *where)
    # 32 x (2 x 64 + 1) x 4096 weights more; half of their products, where the sum is dropped.
    assert "64 of 64 sums; adds 135.5 MB of weights to each rank, and 3.6% to its layers' multiplications" in out
    for model, message in {"llama-2-7b": "is for 4 ranks, not for 8", "llama-2-13b": "5120 values per token"}.items():
        ranks = 8 if model == "llama-2-7b" else 4
        assert cli.main(["plan", *map(str, ("--model", model, "--tp", ranks, *where))]) == 2
        assert message in capsys.readouterr().err


def test_what_has_moved_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--check"])
    assert ended.value.code == 2 and capsys.readouterr().err.endswith("python -m research.published\n")


def test_measured_rows(capsys, tmp_path):
    """Made by the model itself: no error is found, and the file's circumstances are used."""
    CALIBRATION.write(tmp_path / "calibration.yaml")
    row = {"algorithm": "all_reduce", "tp": 2, "link": "local", "prompt_tokens": 16, "speedup_vs_none": 1.0}
    model = tmp_path / "config.json"
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    model.write_text(json.dumps(sizes | {"num_key_value_heads": 2, "vocab_size": 100}))
    stock = 16 * 64 * 4 / 1e6 * 6e3
    rows = [row | {"policy": "none", "ttft_ms": 50 + stock}, row | {"policy": "none", "ttft_ms": 1.0, "tp": 4}]
    rows.append(row | {"policy": "none", "ttft_ms": 50 + stock * 1e6 / 11.25e3, "link": "100kbit"})
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    words = ("--model", model, "--tp", 2, "--prompt-tokens", 16, "--dtype", "float32", "--compute-ms", 50)
    files = ("--calibration", tmp_path / "calibration.yaml", "--measured", tmp_path / "rows.json")
    run(capsys, *words, *files, "--json", tmp_path / "out.json")
    made = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [each["link"] for each in made] == ["local", "100kbit"]
    assert [each["error_pct"] for each in made] == pytest.approx([0, 0], abs=1e-6)


def test_measured_rows_of_a_policy_with_drops_and_mixed_codecs(capsys, tmp_path):
    """As `bench ttft` names it: by its file. Times by hand, at 0.9 of 100 kbit/s and no latency."""
    CALIBRATION.write(tmp_path / "calibration.yaml")
    policy, model = tmp_path / "policy.yaml", tmp_path / "config.json"
    policy.write_text(
        "codec: mxfp4\nalgorithm: gather_sum\nmin_bytes: 0\n"
        "layers: {0: {attention: drop, mlp: int8:32:fp16}, 1: {attention: none}, 2: {attention: drop, mlp: none}}\n"
    )
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    model.write_text(json.dumps(sizes | {"num_key_value_heads": 2, "vocab_size": 100}))
    stock, int8, mxfp4 = 16 * 64 * 4, 16 * 64 + 16 * 2 * 2, 16 * 32 + 16 * 2
    predicted = 50 + 1e3 * (2 * stock + int8 + mxfp4) / (0.9 * 1e5 / 8)
    row = {"algorithm": "gather_sum", "tp": 2, "link": "100kbit", "prompt_tokens": 16, "speedup_vs_none": 1.0}
    rows = [row | {"policy": str(policy), "ttft_ms": 2 * predicted, "dropped": 2}]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    words = ["--model", model, "--tp", 2, "--prompt-tokens", 16, "--dtype", "float32", "--compute-ms", 50]
    words += ["--calibration", tmp_path / "calibration.yaml", "--json", tmp_path / "out.json"]
    run(capsys, *words, "--measured", tmp_path / "rows.json")
    (made,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (made["predicted_ms"], made["error_pct"]) == (pytest.approx(predicted), pytest.approx(-50))
    run(capsys, *words, "--policy", policy, "--link", "100kbit", "--codec", "mxfp4")
    (made,) = (row for row in json.loads((tmp_path / "out.json").read_text())["rows"] if row["codec"] == str(policy))
    assert made["ttft_ms"] == pytest.approx(predicted) and (made["dropped"], made["compressed"]) == (2, 2)
    policy.unlink()
    assert cli.main(["plan", *map(str, words), "--measured", str(tmp_path / "rows.json")]) == 2
    assert "neither a codec nor a policy file that is there" in capsys.readouterr().err


def test_what_dropping_would_add(capsys, tmp_path):
    where = ("--tp", 8, "--gpu", "l4", "--link", "pcie4x16", "--codec", "mxfp4", "--json", tmp_path / "rows.json")
    out = run(capsys, "--model", "llama-2-70b", *where, "--drop", 50)
    *_, two_step, alone, both = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["codec"], row["dropped"]) for row in (two_step, alone, both)] == [
        *zip(("mxfp4", "none", "mxfp4"), (0, 40, 40))
    ]
    saved = two_step["share_of_sums"] * two_step["ttft_ms"] / 4  # half of attention's sums, of as many of the MLP's
    assert both["ttft_ms"] == pytest.approx(two_step["ttft_ms"] - saved)
    gain = two_step["ttft_ms"] / both["ttft_ms"]
    assert (
        f"Dropping 40 of attention's sums beside mxfp4 by two_step: {both['ttft_ms']:.0f} ms predicted, {gain:.2f}"
        in out
    )
    out = run(
        capsys,
        "--model",
        "llama-2-7b",
        "--tp",
        2,
        "--gpu",
        "H100",
        "--link",
        "nvlink4",
        "--prompt-tokens",
        64,
        "--drop",
        25,
    )
    assert "Leave compression off" in out and "Dropping 8 of attention's sums alone" in out


def test_a_link_alone_leaves_codecs_out():
    known = calibration_of(None, None, "100mbit", [Codec.parse("mxfp4")], 3, 4)
    assert known.cost(Codec.parse("mxfp4")) == CodecCost() and known.links["all_gather"].bytes_per_s == 0.9 * 100e6 / 8
    assert known.links == assumed_calibration(EASY, wire_of("100mbit"), ALL, [], 3).links


WHOLE = ["--model", "llama-2-7b", "--tp", "2"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "llama-9", "--tp", "2", "--gpu", "L4", "--link", "1gbit"], "--model llama-9: neither a folder"),
        (WHOLE, "give --gpu, one of L4"),
        ([*WHOLE, "--gpu", "L4"], "give --link, a name (pcie3x16"),
        ([*WHOLE, "--gpu", "L5", "--link", "1gbit"], "--gpu L5: allowed are L4"),
        ([*WHOLE, "--gpu", "L4", "--link", "fast"], "--link 'fast' is no rate"),
        ([*WHOLE, "--gpu", "L4", "--compute-ms", "5", "--link", "1gbit"], "and not both"),
        ([*WHOLE, "--compute-ms", "5", "--link", "1gbit"], "--compute-ms needs --calibration"),
        ([*WHOLE, "--gpu", "L4", "--link", "1gbit", "--codec", "mxfp5"], "codec 'mxfp5'"),
        ([*WHOLE, "--gpu", "L4", "--link", "1gbit", "--batch", "0"], "--batch 0"),
        ([*WHOLE, "--gpu", "L4", "--link", "1gbit", "--prompt-tokens", "9" * 400], "at most 1,000,000,000 are allowed"),
        ([*WHOLE, "--gpu", "L4", "--link", "1gbit", "--drop", "0"], "--drop 0: allowed are percents above 0"),
        (
            ["--model", "mixtral-8x7b", "--tp", "2", "--gpu", "L4", "--link", "1gbit", "--drop", "50"],
            "a mixture of experts cannot do without attention's sums",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, arguments, message):
    assert cli.main(["plan", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("megatron-comp: error") and err.count("\n") == 1


def test_wires_reach_a_share_of_their_rate():
    known = assumed_calibration(EASY, Interconnect(10, 2, "", reached=0.5), ALL, [], 3)
    assert known.links["all_gather"] == Link(5e9, pytest.approx(4e-6))
    assert known.links["all_reduce"].latency_s == pytest.approx(8e-6)


def test_advice_names_what_gains_most():
    base = {"codec": "none", "algorithm": "all_reduce", "ttft_ms": 100.0, "speedup_vs_none": 1.0, "share_of_sums": 0.5}
    base |= {"dropped": 0, "rounds": 0}
    rows = [base, base | {"codec": "a", "ttft_ms": 60.0, "speedup_vs_none": 100 / 60}, base | {"codec": "b"}]
    assert advice(rows).startswith("Compress with a by all_reduce: 60 ms instead of 100")
    assert advice([base, base | {"speedup_vs_none": 1.04}]).startswith("Leave compression off: sums take 50%")
