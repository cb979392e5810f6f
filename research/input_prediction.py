# SPDX-License-Identifier: Apache-2.0
"""How much of a partial sum every rank can compute by itself, and what is gained by sending only the rest.

All ranks of a tensor-parallel group hold a block's input X. With n = norm(X), rank r's partial sum is

    Y_r = U_r V n + b_r + E_r          V [k, hidden], U_r [hidden, k], b_r [hidden]

where V, U_r and b_r come from a ridge regression of rank k on some thousand tokens. Every rank computes the sum of all
U_r V n + b_r; only the residuals E_r are encoded, sent and summed. Where attention's sum is dropped, rank i adds the
predictions of the other ranks' partial sums to its own.

One process computes what N ranks would: the codecs are the project's, the model is one of transformers, in fp32.

    python research/input_prediction.py MODEL --fit handbook.txt --text sotu.txt --ranks 3 --csv rows.csv

Rows are written as they are measured: mean KL in nats per token and perplexity, against the same model uncompressed.
"""

import argparse
import csv
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

from megatron_comp.wire.codec import Codec, parse_codec
from megatron_comp.wire.traffic import step_codecs

SITES = ("attention", "mlp")
# A row that is this many times as large as the median row weighs less in the fit: a few tokens have activations that
# are larger by orders of magnitude, and would decide everything.
CLIP = 3.0
COLUMNS = ["ranks", "text", "codec", "algorithm", "predictor", "sites", "dropped", "kl", "perplexity", "increase_pct"]
CODEC = "int4:32:e5m3:search:hadamard"
RIDGES = (1e-3, 1e-2, 1e-1)


@dataclass
class Predictor:
    """Of one site: `down` [hidden, k], `up` [ranks, k, hidden], `bias` [ranks, hidden]."""

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor
    left: float
    """Energy of the residuals over that of the partial sums, of tokens that the fit did not see."""

    def __call__(self, n: torch.Tensor) -> torch.Tensor:
        """n [tokens, hidden] to the ranks' predictions [ranks, tokens, hidden]."""
        return n @ self.down @ self.up + self.bias[:, None]


@dataclass
class Setting:
    codec: str = "none"
    algorithm: str = "gather_sum"
    predictors: dict = field(default_factory=dict)
    dropped: frozenset[int] = frozenset()


class Ranks:
    """A Llama as N ranks compute it. `observe(layer, site, n, partials)` is called at every sum, if it is given."""

    def __init__(self, folder: Path, count: int) -> None:
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.count, self.setting, self.observe = count, Setting(), None
        self.layers = len(self.model.model.layers)
        for number, layer in enumerate(self.model.model.layers):
            layer.forward = self._forward_of(number, layer)

    def _forward_of(self, number: int, layer: torch.nn.Module):
        project, layer.self_attn.o_proj = layer.self_attn.o_proj.weight, torch.nn.Identity()

        def forward(x, **kwargs):
            n = layer.input_layernorm(x)
            attended, _ = layer.self_attn(hidden_states=n, **kwargs)
            partials = _partials(attended, project, self.count)
            if number in self.setting.dropped:
                return self._dropped(number, layer, x, n, partials)
            h = x + self._sum(number, "attention", n, partials)
            n = layer.post_attention_layernorm(h)
            return h + self._sum(number, "mlp", n, self._mlp(layer, n))

        return forward

    def _mlp(self, layer: torch.nn.Module, n: torch.Tensor, rank: int | None = None) -> torch.Tensor:
        """Partial sums of all ranks, or of one, whose input is `n`."""
        mlp = layer.mlp
        inner = mlp.act_fn(mlp.gate_proj(n)) * mlp.up_proj(n)
        partials = _partials(inner, mlp.down_proj.weight, self.count)
        return partials if rank is None else partials[rank]

    def _dropped(self, number, layer, x, n, partials) -> torch.Tensor:
        """Attention's partial sums stay where they are; one sum of both sites ends the block."""
        predicted = self._predicted(number, "attention", n, partials)
        both = []
        for rank in range(self.count):
            own = x + partials[rank] + predicted.sum(0) - predicted[rank]
            z = self._mlp(layer, layer.post_attention_layernorm(own), rank)
            both.append(partials[rank] + z)
        return x + self._exchange(torch.stack(both))

    def _predicted(self, number: int, site: str, n: torch.Tensor, partials: torch.Tensor) -> torch.Tensor:
        predictor = self.setting.predictors.get((number, site))
        if predictor is None:
            return torch.zeros_like(partials)
        return predictor(n.flatten(0, -2)).view_as(partials)

    def _sum(self, number: int, site: str, n: torch.Tensor, partials: torch.Tensor) -> torch.Tensor:
        if self.observe:
            self.observe(number, site, n.flatten(0, -2), partials.flatten(1, -2))
        if (number, site) not in self.setting.predictors:
            return self._exchange(partials)
        predicted = self._predicted(number, site, n, partials)
        return self._exchange(partials - predicted) + predicted.sum(0)

    def _exchange(self, partials: torch.Tensor) -> torch.Tensor:
        """[ranks, ..., hidden] to their sum as the codec sends it."""
        if self.setting.codec == "none":
            return partials.sum(0)
        first, second = step_codecs(parse_codec(self.setting.codec))
        total = _through(first, partials)
        return total if self.setting.algorithm == "gather_sum" else _through(second, total[None])

    @torch.no_grad()
    def log_probabilities(self, windows: torch.Tensor):
        """[context - 1, vocabulary] of each window."""
        for window in windows:
            yield F.log_softmax(self.model(input_ids=window[None], use_cache=False).logits[0, :-1], -1)


def _partials(x: torch.Tensor, weight: torch.Tensor, ranks: int) -> torch.Tensor:
    parts = zip(x.chunk(ranks, -1), weight.chunk(ranks, -1), strict=True)
    return torch.stack([part @ its.t() for part, its in parts])


def _through(codec: Codec, tensors: torch.Tensor) -> torch.Tensor:
    messages = torch.stack([codec.encode(each) for each in tensors])
    return codec.decode_sum(messages, tensors.shape[1:], tensors.dtype)


class Moments:
    """What a regression of every site's partial sums on its input needs, summed over tokens."""

    def __init__(self) -> None:
        self.of: dict[tuple[int, str], list[torch.Tensor]] = {}

    def add(self, layer: int, site: str, n: torch.Tensor, partials: torch.Tensor) -> None:
        y = partials.transpose(0, 1).flatten(1)  # [tokens, ranks * hidden]
        size = y.norm(dim=-1)
        weight = (CLIP * size.median() / size).clamp(max=1.0)[:, None] ** 2
        x = torch.cat([n, torch.ones_like(n[:, :1])], 1)
        new = [(x * weight).t() @ x, (x * weight).t() @ y, (y * y * weight).sum()[None]]
        old = self.of.get((layer, site))
        self.of[layer, site] = new if old is None else [a.add_(b) for a, b in zip(old, new)]


def fit(seen: Moments, unseen: Moments, ranks: int, sizes: list[int]) -> dict[int, dict[tuple[int, str], Predictor]]:
    """By rank (0: full) and site, the best predictor."""
    found: dict[int, dict] = {k: {} for k in sizes}
    for where in seen.of:
        for k, predictor in _fit_site(seen.of[where], unseen.of[where], ranks, sizes).items():
            found[k][where] = predictor
    return found


def _fit_site(
    seen: list[torch.Tensor], unseen: list[torch.Tensor], ranks: int, sizes: list[int]
) -> dict[int, Predictor]:
    """The ridge is the one that is best, at full rank, for tokens that the regression did not see."""
    gram, cross, _ = (each.double() for each in seen)
    hidden = gram.shape[0] - 1
    identity = torch.eye(hidden, dtype=gram.dtype)
    tried = []
    for ridge in RIDGES:
        penalty = torch.zeros_like(gram)
        penalty[:-1, :-1] = ridge * gram.diagonal()[:-1].mean() * identity
        full = torch.linalg.solve(gram + penalty, cross)  # [hidden + 1, ranks * hidden]
        tried.append((_left(unseen, identity, full[:-1], full[-1]), penalty, full))
    _, penalty, full = min(tried, key=lambda each: each[0])
    slope, bias = full[:-1], full[-1]
    # Least squares of rank k: the leading directions of the predictions, about their mean.
    mean = gram[-1, :-1] / gram[-1, -1]
    spread = (gram + penalty)[:-1, :-1] - gram[-1, -1] * mean[:, None] * mean
    root = torch.linalg.cholesky(spread)
    seen_slope = root.t() @ slope
    _, vectors = torch.linalg.eigh(seen_slope @ seen_slope.t())
    predictors = {}
    for k in sizes:
        basis = vectors[:, -k:] if k else vectors
        down = torch.linalg.solve_triangular(root.t(), basis, upper=True)
        up = basis.t() @ seen_slope
        its_bias = bias + mean @ (slope - down @ up)
        left = _left(unseen, down, up, its_bias)
        shared = up.view(-1, ranks, hidden).transpose(0, 1).contiguous()
        predictors[k] = Predictor(down.float(), shared.float(), its_bias.view(ranks, hidden).float(), left)
    return predictors


def _left(moments: list[torch.Tensor], down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor) -> float:
    gram, cross, energy = (each.double() for each in moments)
    full = torch.cat([down @ up, bias[None]])
    return float((energy - 2 * (full * cross).sum() + (full * (gram @ full)).sum()) / energy)


def windows_of(path: Path, tokenizer, tokens: int, context: int) -> torch.Tensor:
    ids = tokenizer.encode(path.read_text(encoding="utf-8")[: 8 * tokens])[:tokens]
    if len(ids) < tokens:
        raise ValueError(f"{path} has {len(ids)} tokens, {tokens} are needed")
    return torch.tensor(ids).view(-1, context)


def judge(ranks: Ranks, setting: Setting, windows: torch.Tensor, full: list[torch.Tensor]) -> dict:
    ranks.setting = setting
    kl = nll = count = 0
    for window, log_p, reference in zip(windows, ranks.log_probabilities(windows), full, strict=True):
        reference = reference.float()
        kl += float((reference.exp() * (reference - log_p)).sum())
        nll -= float(log_p.gather(1, window[1:, None]).sum())
        count += len(log_p)
    return {"kl": kl / count, "perplexity": math.exp(nll / count)}


def collect(ranks: Ranks, windows: torch.Tensor) -> Moments:
    moments = Moments()
    ranks.setting, ranks.observe = Setting(), moments.add
    for _ in ranks.log_probabilities(windows):
        pass
    ranks.observe = None
    return moments


def chosen(predictors: dict, most_left: float) -> dict:
    """Those of sites where enough is gained on tokens that the fit did not see."""
    return {where: each for where, each in predictors.items() if each.left <= most_left}


def least_sensitive_first(ranks: Ranks, windows: torch.Tensor, full: list[torch.Tensor]) -> list[int]:
    cost = {n: judge(ranks, Setting(dropped=frozenset([n])), windows, full)["kl"] for n in range(ranks.layers)}
    return sorted(cost, key=cost.get)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a Llama checkpoint")
    parser.add_argument("--fit", type=Path, required=True, metavar="FILE", help="text of the regression")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="text that is judged, of another kind")
    parser.add_argument("--ranks", type=int, default=3, metavar="N")
    parser.add_argument("--fit-tokens", type=int, default=12288, metavar="T")
    parser.add_argument("--tokens", type=int, default=4096, metavar="T")
    parser.add_argument("--context", type=int, default=512, metavar="T")
    parser.add_argument("--codec", action="append", metavar="C", help="again for more; `a>b` and CODEC@two_step")
    parser.add_argument("--rank", action="append", type=int, metavar="K", help="of predictors; 0: full; again for more")
    parser.add_argument("--most-left", type=float, default=0.95, metavar="R", help="predict sites below this residual")
    parser.add_argument("--drop", action="append", type=int, default=[], metavar="COUNT", help="dropped sums, uncoded")
    parser.add_argument("--csv", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ranks = Ranks(args.model, args.ranks)
    fit_windows = windows_of(args.fit, tokenizer, args.fit_tokens * 5 // 4, args.context)
    count = args.fit_tokens // args.context
    seen, unseen = fit_windows[:count], fit_windows[count:]
    texts = {"unlike": windows_of(args.text, tokenizer, args.tokens, args.context)}
    more = windows_of(args.fit, tokenizer, args.fit_tokens * 5 // 4 + args.tokens, args.context)
    texts["like"] = more[len(fit_windows) :]
    moments = collect(ranks, seen), collect(ranks, unseen)
    predictors = {"": {}}
    for k, all_sites in fit(*moments, args.ranks, args.rank or [32, 64, 128]).items():
        predictors[f"rank {k}" if k else "full rank"] = chosen(all_sites, args.most_left)
        print(f"rank {k or 'full'}: residual energy by site", flush=True)
        for site in SITES:
            print(f"  {site}:", *(f"{all_sites[n, site].left:.2f}" for n in range(ranks.layers)), flush=True)
    new = not args.csv.exists()
    with args.csv.open("a", newline="") as file:
        rows = csv.writer(file)
        if new:
            rows.writerow(COLUMNS)
        for text, windows in texts.items():
            ranks.setting = Setting()
            full = [each.half() for each in ranks.log_probabilities(windows)]
            base = judge(ranks, Setting(), windows, full)["perplexity"]
            settings = [
                (codec, algorithm or "gather_sum", name, 0)
                for codec, _, algorithm in (each.partition("@") for each in args.codec or [CODEC])
                for name in predictors
            ]
            settings += [("none", "gather_sum", name, count) for count in args.drop for name in predictors]
            order = least_sensitive_first(ranks, windows[:2], full[:2]) if args.drop else []
            for codec, algorithm, name, count in settings:
                start = time.perf_counter()
                setting = Setting(codec, algorithm, predictors[name], frozenset(order[:count]))
                found = judge(ranks, setting, windows, full)
                increase = 100 * (found["perplexity"] / base - 1)
                row = [args.ranks, text, codec, algorithm, name or "none", len(predictors[name]), count]
                rows.writerow([*row, f"{found['kl']:.5f}", f"{found['perplexity']:.4f}", f"{increase:.3f}"])
                file.flush()
                took = time.perf_counter() - start
                print(*row, f"KL {found['kl']:.4f} {increase:+.2f} % in {took:.0f} s", flush=True)


if __name__ == "__main__":
    main()
