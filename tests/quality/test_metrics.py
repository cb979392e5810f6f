# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from scipy import stats

from megatron_comp.quality.metrics import MAX_NLL, Prediction, Quality, increase_pct, perplexity, with_intervals

TOKENS, VOCABULARY = 50, 31


def run(rank, world_size, logits, base_logits, targets):
    """Each rank holds a part of the vocabulary; the last one's is shorter."""
    width = -(-VOCABULARY // world_size)
    start = rank * width
    mine = slice(start, start + width)
    said, baseline = (Prediction.of(x[:, mine], start, dist.group.WORLD) for x in (logits, base_logits))
    quality = Quality()
    for part in (slice(0, 20), slice(20, None)):
        its = (Prediction(p.log_probs[part], p.best[part]) for p in (said, baseline))
        quality.add(*its, targets[part], start, dist.group.WORLD)
    return said.best, torch.cat(quality.windows, dim=1), (quality.nll, quality.kl, quality.top1_agreement)


def test_equals_unsharded():
    generator = torch.Generator().manual_seed(0)
    base_logits = 3 * torch.randn(TOKENS, VOCABULARY, generator=generator)
    logits = base_logits + torch.randn(TOKENS, VOCABULARY, generator=generator)
    logits[0, [3, 17, 30]] = 100.0  # equal highest on three ranks: the lowest entry is the best
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)

    log_probs, base_log_probs = (x.double().log_softmax(-1) for x in (logits, base_logits))
    true, base_true = (x.gather(1, targets[:, None])[:, 0] for x in (log_probs, base_log_probs))
    kl = torch.nn.functional.kl_div(log_probs, base_log_probs, reduction="none", log_target=True).sum(-1)
    agrees = (logits.argmax(-1) == base_logits.argmax(-1)).double()
    expected = torch.stack([-true, kl, agrees, true.exp() - base_true.exp()])

    for best, of_tokens, means in run_ranks(run, 3, logits, base_logits, targets):
        assert best[0] == 3
        assert torch.equal(best[1:], logits[1:].argmax(-1))
        torch.testing.assert_close(of_tokens, expected, rtol=1e-5, atol=2e-6)
        assert means == pytest.approx(expected[:3].mean(1).tolist(), rel=1e-5)


def drawn(windows, seed, context=40):
    """Windows that differ more than their tokens do; the base has none of the rest."""
    generator = np.random.default_rng(seed)
    level = generator.gamma(4, 0.02, (windows, 1))
    kl = level * generator.exponential(1, (windows, context))
    nll = 3 + generator.normal(size=(windows, context))
    agrees = (generator.random((windows, context)) < 0.8).astype(float)
    said = np.stack([nll + kl, kl, agrees, 0.1 * generator.normal(size=kl.shape)], axis=1)
    base = np.stack([nll, 0 * kl, 1 + 0 * kl, 0 * kl], axis=1)
    return [Quality([torch.tensor(window) for window in windows]) for windows in (said, base)]


def test_figures_of_a_text_and_their_intervals():
    """Against numpy on all tokens, and scipy's standard error of the windows' means."""
    said, base = drawn(60, 1)
    row = with_intervals(said, base)
    nll, kl, agrees, change = torch.cat(said.windows, dim=1).numpy()
    expected = {
        "perplexity": np.exp(nll.mean()),
        "perplexity_increase_pct": 100 * np.expm1(kl.mean()),
        "kl": kl.mean(),
        "kl_median": np.median(kl),
        "kl_p95": np.percentile(kl, 95),
        "kl_p99": np.percentile(kl, 99),
        "top1_agreement": agrees.mean(),
        "rms_probability_change": np.sqrt((change**2).mean()),
    }
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-12)
    assert set(row) == {key + end for key in expected for end in ("", "_low", "_high")}
    assert all(row[f"{key}_low"] < row[key] < row[f"{key}_high"] for key in expected)
    error = stats.sem(kl.reshape(60, -1).mean(1))
    assert row["kl_high"] - row["kl_low"] == pytest.approx(2 * 1.96 * error, rel=0.15)
    # Tokens alone would say less than half of that: those of one window are alike.
    assert row["kl_high"] - row["kl_low"] > 2 * 2 * 1.96 * stats.sem(kl)
    # The change of perplexity is paired: far surer than the perplexity itself.
    relative = (row["perplexity_high"] - row["perplexity_low"]) / row["perplexity"]
    assert row["perplexity_increase_pct_high"] - row["perplexity_increase_pct_low"] < 100 * relative / 2


def test_figures_that_a_person_can_check():
    """Two windows of two tokens. Resamples of two windows are the first twice, both, or the second twice."""
    base = [[[1.0, 1.0], [0, 0], [1, 1], [0, 0]], [[1.0, 1.0], [0, 0], [1, 1], [0, 0]]]
    said = [[[1.1, 1.1], [0.1, 0.3], [1, 0], [0.3, 0.3]], [[1.3, 1.3], [0.0, 0.0], [1, 1], [-0.4, 0.4]]]
    row = with_intervals(*(Quality([torch.tensor(window).double() for window in windows]) for windows in (said, base)))
    for name, ends in (("kl", (0, 0.1, 0.2)), ("top1_agreement", (0.5, 0.75, 1)), ("kl_median", (0, 0.05, 0.2))):
        assert (row[f"{name}_low"], row[name], row[f"{name}_high"]) == pytest.approx(ends, abs=1e-7)
    assert row["rms_probability_change"] == pytest.approx(math.sqrt((2 * 0.09 + 2 * 0.16) / 4))
    assert row["perplexity"] == pytest.approx(math.exp(1.2))
    assert row["perplexity_increase_pct_high"] == pytest.approx(100 * math.expm1(0.3))


def test_one_window_has_no_interval_and_a_ruined_text_is_no_error():
    said, base = drawn(1, 2)
    row = with_intervals(said, base)
    assert row["kl"] > 0 and row["kl_low"] is row["kl_high"] is None
    said, base = drawn(3, 2)
    for window in said.windows:
        window[0] += 1000
    row = with_intervals(said, base)
    assert row["perplexity"] == row["perplexity_increase_pct_low"] == math.inf


def test_perplexity_of_what_a_codec_has_ruined():
    """One rule: infinite above 700 nats, and never an OverflowError; what is not a number stays so."""
    assert perplexity(3.0) == pytest.approx(20.0855, rel=1e-5) and perplexity(MAX_NLL) == math.exp(700)
    assert perplexity(700.1) == math.inf == perplexity(math.inf) and math.isnan(perplexity(math.nan))
    assert increase_pct(3.0, 3.0) == 0 and increase_pct(3.1, 3.0) == pytest.approx(10.517, rel=1e-4)
    assert increase_pct(3.0, 3.1) == pytest.approx(-9.516, rel=1e-4) and increase_pct(704.0, 3.0) == math.inf
