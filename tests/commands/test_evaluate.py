# SPDX-License-Identifier: Apache-2.0
import csv
import json
import math

import oracles
import pytest
import torch
from models import policy
from ranks import run_ranks

from megatron_comp.commands import options, setup
from megatron_comp.commands.evaluate import evaluate
from megatron_comp.inference.model import build_model, init_parallel
from megatron_comp.quality.judge import Judge

KEYS = "codec algorithm bits_per_value perplexity perplexity_increase_pct kl top1_agreement bytes_per_rank seconds"
FIGURES = "perplexity perplexity_increase_pct kl kl_median kl_p95 kl_p99 top1_agreement rms_probability_change"
COLUMNS = {*KEYS.split(), *(key + end for key in FIGURES.split() for end in ("", "_low", "_high"))}
WINDOWS, CONTEXT = 2, 64


@pytest.fixture(scope="module")
def expected_perplexity(smollm2, sotu_text):
    """Of the uncompressed model, as transformers alone computes it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(smollm2).encode(sotu_text.read_text()[:2000])[: WINDOWS * CONTEXT]
    ids = torch.tensor(ids).view(WINDOWS, CONTEXT)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.no_grad():
        log_probs = model(ids).logits[:, :-1].log_softmax(-1)
    return math.exp(-log_probs.gather(-1, ids[:, 1:, None]).mean().item())


def test_rows(command, smollm2, sotu_text, tmp_path, expected_perplexity):
    done = command(
        *("evaluate", "--model", smollm2, "--tp", 3, "--text", sotu_text, "--json", tmp_path / "rows.json"),
        *("--tokens", WINDOWS * CONTEXT, "--context", CONTEXT, "--algorithm", "gather_sum"),
        *("--codec", "int8:32:fp16", "--codec", "mxfp4", "--csv", tmp_path / "rows.csv"),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["codec"] for row in rows] == ["none", "int8:32:fp16", "mxfp4"]
    assert all(set(row) == COLUMNS for row in rows)
    with (tmp_path / "rows.csv").open() as file:
        assert [float(row["kl_p95"]) for row in csv.DictReader(file)] == [row["kl_p95"] for row in rows]
    none, int8, mxfp4 = rows

    # Sums of fp32 in another order: 2e-5 were seen.
    assert none["perplexity"] == pytest.approx(expected_perplexity, rel=1e-4)
    assert (none["kl"], none["top1_agreement"], none["perplexity_increase_pct"]) == (0, 1, 0)
    assert 0 < int8["kl"] < 0.01 < mxfp4["kl"] < 1
    assert mxfp4["top1_agreement"] < int8["top1_agreement"] <= 1
    assert 0 == none["kl_p99"] < mxfp4["kl_low"] < mxfp4["kl"] < mxfp4["kl_high"]
    assert int8["rms_probability_change"] < mxfp4["rms_probability_change"]
    assert f"{mxfp4['kl']:.4f} ({mxfp4['kl_low']:.4f} to {mxfp4['kl_high']:.4f})" in done.stdout

    values = 60 * WINDOWS * CONTEXT * 576
    assert [row["bits_per_value"] for row in rows] == [32, 8.5, 4.25]
    assert none["bytes_per_rank"] == values * 4 * 2 * 2 // 3  # a ring of 3
    assert mxfp4["bytes_per_rank"] == values * 4.25 / 8 * 2
    for row in rows:
        assert row["codec"] in done.stdout


def mixtral_rows(rank, world_size, ref, dispatcher):
    init_parallel(world_size)
    model = build_model(ref.folder, token_dispatcher=dispatcher)
    return evaluate(Judge(model, ref.ids, keep=False), [setup.Setting("mxfp8", policy(codec="mxfp8"))])[0]


@pytest.mark.parametrize("dispatcher", options.TOKEN_DISPATCHERS)
def test_rows_of_a_mixtral_count_its_experts(mixtrals, dispatcher):
    """Two windows of 11 tokens, 3 layers of hidden size 96.

    Without sequence parallelism stock dispatchers reduce-scatter every token twice, all-to-all for each of its experts.
    """
    for none, mxfp8 in run_ranks(mixtral_rows, 2, mixtrals[4], dispatcher):
        ring = reduce_scatter = 11 * 96 * 4
        copies = {"allgather": 1, "alltoall": 2}[dispatcher]
        assert none["bytes_per_rank"] == 2 * 3 * (ring + copies * reduce_scatter)
        assert mxfp8["bytes_per_rank"] == 2 * 3 * 2 * oracles.message_bytes("fp8_e4m3:32:e8m0", (11, 96))
        assert 0 < mxfp8["kl"] < 0.05


def test_codecs_of_a_policy_are_judged_whatever_its_gate(command, llama, text, tmp_path):
    """And where --min-bytes lets nothing through, that is said. The only window is as long as the text that is read."""
    policy_file, rows = tmp_path / "policy.yaml", tmp_path / "rows.json"
    policy_file.write_text("codec: mxfp4\nalgorithm: gather_sum\nmin_bytes: 1000000000\n")
    words = ("evaluate", "--model", llama, "--tp", 2, "--text", text, "--tokens", 128)
    for more, bits in ((), 4.25), (("--min-bytes", 1000000), 32):
        done = command(*words, "--policy", policy_file, *more, "--json", rows)
        assert done.returncode == 0, done.stderr
        _, row = json.loads(rows.read_text())["rows"]
        assert (row["bits_per_value"], row["kl"] > 0) == (bits, bits == 4.25)
        assert ("0 of 6 sums were compressed; uncompressed: 6 (min_bytes)" in done.stdout) == bool(more)
