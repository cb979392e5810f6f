"""What a policy may cost in quality."""

import math
from dataclasses import dataclass

# Of the paper's search, arXiv 2411.09510
MAX_INCREASE_PCT = 3.0


def perplexity_increase_pct(point: dict) -> float:
    """Of a measured point, over the uncompressed model on the same tokens."""
    increase = point["nll"] - point["base_nll"]
    return 100 * math.expm1(increase) if increase < 700 else math.inf


@dataclass(frozen=True)
class Bound:
    """The most that a policy may cost, by `kl` (nats a token) or by `perplexity` (percent)."""

    by: str
    limit: float

    def of(self, point: dict) -> float:
        """What a measured point costs, in the bound's own unit."""
        return point["kl"] if self.by == "kl" else perplexity_increase_pct(point)

    @property
    def first_budget(self) -> float:
        """A predicted KL to begin with: predictions are of KL, and where predictions of tokens are as good as they are
        sure, KL is what the mean log-probability of the text loses."""
        return self.limit if self.by == "kl" else math.log1p(self.limit / 100)

    def __str__(self) -> str:
        return f"KL <= {self.limit:g}" if self.by == "kl" else f"perplexity increase <= {self.limit:g} %"
