# SPDX-License-Identifier: Apache-2.0
"""Which rank gets which heads, for a block without attention's sum, where each rank's MLP sees its own heads only.

arXiv 2502.20727: heads are grouped by how far apart their attention scores are on calibration text, groups are matched
to MLP shards by the norm of what the MLP puts out, and weights are permuted. Under grouped-query attention a key-value
head and its query heads stay together. The paper's own criterion is the largest sum of distances within a
rank ("diverse"); accounts of it differ in what that is to mean, so its opposite ("similar") is here too. Shards are
matched by the largest norm ("norm", the paper's), or by the least change of their output ("error", ours).
"""

from functools import cache

import torch

from .block import Block, split_columns, split_mlp
from .criteria import ASSIGNMENTS, MATCHES
from .training import error

STARTS = 8  # of the search for a partition


@torch.no_grad()
def candidates(block: Block, x: torch.Tensor, target: torch.Tensor, rope: tuple, ranks: int) -> dict[str, dict]:
    """By criterion, `own` being the model's order: `order`, key-value heads from the first rank's to the last's, and
    `relative` and `mse`, the block's error without attention's sum if heads stand so.

    x, target `[windows, context, hidden]`: what the full model's block gets and gives.
    """
    distances = group_distances(block.attention_scores(x, rope), block.groups)
    own = list(range(block.groups))
    orders = {"own": own}
    for assign in ASSIGNMENTS:
        parts = partition(distances, ranks, largest=assign == "diverse")
        placed = [group for part in parts for group in part]
        for match in MATCHES:
            scores = match_scores(_permuted(block, placed), x, rope, ranks, match)
            orders[f"{assign}-{match}"] = [group for part in best_matching(scores) for group in parts[part]]
    return {
        name: {"order": order, **error(_permuted(block, order), x, target, rope, ranks)}
        for name, order in orders.items()
    }


def group_distances(scores: torch.Tensor, groups: int) -> torch.Tensor:
    """`[heads, context, context]` scores to `[groups, groups]`: Euclidean distances, summed over pairs of heads."""
    flat = scores.flatten(1)
    heads = torch.cdist(flat[None], flat[None])[0]
    size = len(flat) // groups
    return heads.view(groups, size, groups, size).sum((1, 3)).fill_diagonal_(0)


def partition(distances: torch.Tensor, ranks: int, largest: bool) -> list[list[int]]:
    """Groups in `ranks` equal parts whose sum of distances within parts is the largest, or the least, that exchanges of
    two groups lead to, from the model's own order and from some drawn ones. Parts and their groups in ascending order.
    """
    groups, size = len(distances), len(distances) // ranks
    sign = 1 if largest else -1
    generator = torch.Generator().manual_seed(1)
    best, best_value = None, None
    for start in range(STARTS if size > 1 else 1):
        order = torch.randperm(groups, generator=generator).tolist() if start else list(range(groups))
        value = _climb(order, distances, size, sign)
        if best is None or value > best_value + 1e-9 * abs(best_value):
            best, best_value = order, value
    return sorted(sorted(best[part * size : (part + 1) * size]) for part in range(ranks))


def _climb(order: list[int], distances: torch.Tensor, size: int, sign: int) -> float:
    """Exchanges members of `order` in place as long as that gains; the value it ends with."""

    def value() -> float:
        parts = torch.tensor(order).view(-1, size)
        return sign * sum(distances[part][:, part].sum().item() for part in parts)

    now, gained = value(), True
    while gained:
        gained = False
        for a in range(len(order)):
            for b in range(a + 1, len(order)):
                if a // size == b // size:
                    continue
                order[a], order[b] = order[b], order[a]
                if (then := value()) > now + 1e-9 * abs(now):
                    now, gained = then, True
                else:
                    order[a], order[b] = order[b], order[a]
    return now


@torch.no_grad()
def match_scores(block: Block, x: torch.Tensor, rope: tuple, ranks: int, match: str) -> list[list[float]]:
    """`[part of the heads][shard of the MLP]`, the more the better: the mean norm of what the shard puts out if it sees
    that part's attention; or less the mean change of it, from what it puts out when it sees all attention."""
    layer, scores = block.modules_of, torch.zeros(ranks, ranks, dtype=torch.float64)
    for window in x:
        partial = split_columns(block.heads(window[None], rope), layer.self_attn.o_proj.weight, ranks)
        everything = layer.post_attention_layernorm(window + partial.sum(0, keepdim=True))
        exact = split_mlp(layer.mlp, everything.expand(ranks, *everything.shape[1:]), ranks)
        for part in range(ranks):
            normed = layer.post_attention_layernorm(window + partial[part])
            seen = split_mlp(layer.mlp, normed.expand(ranks, *normed.shape), ranks)
            scored = seen if match == "norm" else exact - seen
            scores[part] += scored.norm(dim=-1).flatten(1).mean(1).double().cpu() / len(x)
    return (scores if match == "norm" else -scores).tolist()


def best_matching(scores: list[list[float]]) -> list[int]:
    """For each shard its part, every part once, so that the sum of scores is the largest."""

    @cache
    def best(shard: int, free: frozenset) -> tuple[float, tuple[int, ...]]:
        if not free:
            return 0.0, ()
        tried = []
        for part in sorted(free):
            value, others = best(shard + 1, free - {part})
            tried.append((scores[part][shard] + value, (part, *others)))
        return max(tried, key=lambda each: each[0])

    return list(best(0, frozenset(range(len(scores))))[1])


def permuted_attention(block: Block, order: list[int]) -> dict[str, torch.Tensor]:
    """The projections of attention with key-value heads, and the query heads of each, in another order; by the names of
    their parameters. The stock block computes the same with them, up to the order in which heads are added."""
    attention, size = block.modules_of.self_attn, block.modules_of.self_attn.head_dim
    queries = attention.num_key_value_groups
    rows = torch.cat([torch.arange(group * size, (group + 1) * size) for group in order])
    query_rows = torch.cat([torch.arange(group * queries * size, (group + 1) * queries * size) for group in order])
    permuted = {name: getattr(attention, f"{name}_proj").weight.detach() for name in "qkvo"}
    permuted |= {"q": permuted["q"][query_rows], "o": permuted["o"][:, query_rows]}
    permuted |= {name: permuted[name][rows] for name in "kv"}
    return {f"self_attn.{name}_proj.weight": weight for name, weight in permuted.items()}


def _permuted(block: Block, order: list[int]) -> Block:
    """A block of its own with its heads in that order."""
    return block.replaced(permuted_attention(block, order))
