# SPDX-License-Identifier: Apache-2.0
"""What a policy may cost in quality."""

import math
from dataclasses import dataclass

from ..quality.metrics import increase_pct

# Of the paper's search, arXiv 2411.09510
MAX_INCREASE_PCT = 3.0


@dataclass(frozen=True)
class Bound:
    """The most that a policy may cost, by `kl` (nats per token) or by `perplexity` (percent)."""

    by: str
    limit: float

    def of(self, point: dict) -> float:
        """What a measured point costs, in the bound's own unit."""
        return point["kl"] if self.by == "kl" else increase_pct(point["nll"], point["base_nll"])

    @property
    def first_budget(self) -> float:
        """A predicted KL to begin with: predictions are of KL, and where predictions of tokens are as good as they are
        sure, KL is what the mean log-probability of the text loses."""
        return self.limit if self.by == "kl" else math.log1p(self.limit / 100)

    def __str__(self) -> str:
        return f"KL <= {self.limit:g}" if self.by == "kl" else f"perplexity increase <= {self.limit:g} %"
