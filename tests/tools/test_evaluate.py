import json
import math

import pytest
import torch

KEYS = "codec algorithm bits_per_value perplexity perplexity_increase_pct kl top1_agreement bytes_per_rank seconds"
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
        *("--codec", "int8:32:fp16", "--codec", "mxfp4"),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["codec"] for row in rows] == ["none", "int8:32:fp16", "mxfp4"]
    assert all(set(row) == set(KEYS.split()) for row in rows)
    none, int8, mxfp4 = rows

    assert none["perplexity"] == pytest.approx(expected_perplexity, rel=1e-5)
    assert (none["kl"], none["top1_agreement"], none["perplexity_increase_pct"]) == (0, 1, 0)
    assert 0 < int8["kl"] < 0.01 < mxfp4["kl"] < 1
    assert mxfp4["top1_agreement"] < int8["top1_agreement"] <= 1

    values = 60 * WINDOWS * CONTEXT * 576
    assert [row["bits_per_value"] for row in rows] == [32, 8.5, 4.25]
    assert none["bytes_per_rank"] == values * 4 * 2 * 2 // 3  # a ring of 3
    assert mxfp4["bytes_per_rank"] == values * 4.25 / 8 * 2
    for row in rows:
        assert row["codec"] in done.stdout
