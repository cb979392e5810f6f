# SPDX-License-Identifier: Apache-2.0
from collections import Counter

from megatron_comp.layers.meter import ModelStats, SiteStats, Traffic


def test_a_table_has_a_line_for_each_place():
    """4.25 of 32 bits in 2 calls of 800 values, and one stock sum of as many; logits, which no layer has."""
    attention = SiteStats(3, "attention", Traffic(2, 1600, 850, 1700, 0.25), Traffic(1, 800, 3200, 6400))
    attention.algorithms, attention.kept_because = Counter(gather_sum=2), Counter(min_bytes=1)
    logits = SiteStats(None, "logits", Traffic(1, 100, 400, 1_234), algorithms=Counter(candidates=1))
    assert ModelStats([attention, logits]).table().splitlines() == [
        "layer  site       compressed    uncompressed  bits per value  bytes received  seconds",
        "    3  attention  gather_sum 2  min_bytes 1            13.50           8,100    0.250",
        "       logits     candidates 1  0                      32.00           1,234",
    ]
