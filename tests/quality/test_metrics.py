# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from megatron_comp.quality.metrics import MAX_NLL, Prediction, Quality, increase_pct, perplexity

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
    return said.best, (quality.nll, quality.kl, quality.agreements, quality.tokens)


def test_equals_unsharded():
    generator = torch.Generator().manual_seed(0)
    base_logits = 3 * torch.randn(TOKENS, VOCABULARY, generator=generator)
    logits = base_logits + torch.randn(TOKENS, VOCABULARY, generator=generator)
    logits[0, [3, 17, 30]] = 100.0  # equal highest on three ranks: the lowest entry is the best
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)

    log_probs, base_log_probs = (x.double().log_softmax(-1) for x in (logits, base_logits))
    nll = -log_probs.gather(1, targets[:, None]).sum()
    kl = torch.nn.functional.kl_div(log_probs, base_log_probs, reduction="sum", log_target=True)
    agreements = (logits.argmax(-1) == base_logits.argmax(-1)).sum()
    expected = torch.tensor([nll, kl, agreements, TOKENS])

    for best, figures in run_ranks(run, 3, logits, base_logits, targets):
        assert best[0] == 3
        assert torch.equal(best[1:], logits[1:].argmax(-1))
        torch.testing.assert_close(torch.tensor(figures), expected, rtol=1e-5, atol=1e-4, check_dtype=False)


def test_perplexity_of_what_a_codec_has_ruined():
    """One rule: infinite above 700 nats, and never an OverflowError; what is not a number stays so."""
    assert perplexity(3.0) == pytest.approx(20.0855, rel=1e-5) and perplexity(MAX_NLL) == math.exp(700)
    assert perplexity(700.1) == math.inf == perplexity(math.inf) and math.isnan(perplexity(math.nan))
    assert increase_pct(3.0, 3.0) == 0 and increase_pct(3.1, 3.0) == pytest.approx(10.517, rel=1e-4)
    assert increase_pct(3.0, 3.1) == pytest.approx(-9.516, rel=1e-4) and increase_pct(704.0, 3.0) == math.inf
