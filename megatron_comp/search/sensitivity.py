# SPDX-License-Identifier: Apache-2.0
"""What each candidate's rounding error costs in KL, for all places and candidates in one pass over a text.

Near the uncompressed model KL is a quadratic form of the error d that is added to a sum: E[(g . d)^2] / 2, where g is
the gradient, with respect to that sum, of the log-probability of tokens drawn from the model's own predictions (the
Fisher information). One backward pass from drawn tokens brings g to every place; there, in the backward of the sum
itself, the error of every candidate is made and met with it. Errors of different tokens and of different places are
taken as uncorrelated:

    damage(place, step, candidate) = sum over tokens of (g_token . d_token)^2 / 2        nats, over the whole text

Step 0 rounds the partial sums, d = sum over ranks of (decode(encode(partial)) - partial). Step 1, the second phase of
`two_step`, rounds their sum, d = decode(encode(sum)) - sum. Damages of both steps add up as well.

In a block that drops attention's sum, the MLP's message carries attention's partial sum as well. What rounding that one
costs is measured in the same pass, from the stock block's two partial sums: the dropped block's own, which differ by
what its MLP sees, would take a pass for every block.

With a predictor only what it leaves is rounded: partial and sum are then of what is left.

Measured on SmolLM2, TP=3, 2044 tokens: from 3-bit to 6-bit codecs at all places at once, the sum of damages was 0.90 to
1.07 of the KL that those codecs really had (0.78 for mxfp4, at a KL of 0.18).
"""

import torch
import torch.distributed as dist

from ..inference.generate import differentiable_logits
from ..layers.apply import apply_compression, remove_compression
from ..layers.places import Place, find_places, reducers
from ..layers.predictor import SitePredictor
from ..layers.reducer import Reducer
from ..policy import CompressionPolicy
from ..quality.metrics import Prediction
from ..wire.codec import Codec

SEED = 1  # of the drawn tokens


class Probe(Reducer):
    """Sums like the stock collective; when the gradient of the sum comes back, it measures all candidates.

    damage: float64 `[2 steps, candidates]`, nats over all tokens seen. nbytes: of each candidate's message.
    attention: of an MLP's probe, that of the same layer's attention, if `joined` is to be measured: the damage to the
    sum of both, in one message.
    """

    def __init__(
        self,
        policy: CompressionPolicy,
        place: Place,
        candidates: tuple[Codec, ...],
        predictor: SitePredictor | None,
    ) -> None:
        super().__init__(policy, place.layer, place.site, place.group, predictor=predictor)
        self.candidates = candidates
        self.attention: Probe | None = None
        self.damage = torch.zeros(2, len(candidates), dtype=torch.float64)
        self.joined = torch.zeros_like(self.damage)
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None
        self.nbytes: list[int] = []
        self.values = 0

    def __call__(self, partial: torch.Tensor, scatter: bool = False, training: bool = False, splits=None):
        if scatter:
            raise ValueError("search measures all-reduces, not the reduce-scatters of sequence or expert parallelism")
        # Weights are frozen: without the anchor nothing before the first sum, nor that sum, would have a gradient.
        anchor = torch.zeros((), requires_grad=True)
        return _Probed.apply(partial, anchor, self, self.group)

    def measure(self, partial: torch.Tensor, total: torch.Tensor, g: torch.Tensor, group: dist.ProcessGroup) -> None:
        """partial, total and g `[..., hidden]`: this rank's share, the sum of all, the gradient of that sum."""
        self.values = partial.numel()
        self.nbytes = [codec.message_bytes(partial.shape) for codec in self.candidates]
        self.damage += self._damage(partial, total, g, group)
        if self.attention:
            self.joined += self._damage(*map(torch.add, self.attention.last, (partial, total)), g, group)

    def row(self) -> dict:
        """As JSON."""
        said = {"layer": self.layer, "site": self.site, "values": self.values, "nbytes": self.nbytes}
        said["damage"] = self.damage.tolist()
        return said | ({"joined": self.joined.tolist()} if self.attention else {})

    def go_on(self, row: dict) -> None:
        """From what an earlier run has counted."""
        self.damage += torch.tensor(row["damage"], dtype=torch.float64)
        if self.attention:
            self.joined += torch.tensor(row["joined"], dtype=torch.float64)

    def _damage(
        self, partial: torch.Tensor, total: torch.Tensor, g: torch.Tensor, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ranks, rank = group.size(), group.rank()
        nothing = g.new_zeros(partial.numel() // partial.shape[-1], dtype=torch.float32)
        met = [_met(codec, partial, g) for codec in self.candidates]
        # What all ranks hold alike is shared out among them.
        met += [_met(c, total, g) if i % ranks == rank else nothing for i, c in enumerate(self.candidates)]
        met = torch.stack(met)
        dist.all_reduce(met, group=group)
        return met.double().square().sum(1).cpu().view_as(self.damage) / 2


def _met(codec: Codec, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """g . d of each token: fp32 `[tokens]`."""
    error = codec.decode(codec.encode(x), x.shape, torch.float32) - x.float()
    return (error * g.float()).sum(-1).flatten()


class _Probed(torch.autograd.Function):
    """Forward: the sum over ranks. Backward: identity, as Megatron's own, after the measurement."""

    @staticmethod
    def forward(ctx, partial, anchor, probe, group):
        total = partial.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        ctx.save_for_backward(partial, total)
        probe.last = (partial.detach(), total)
        ctx.probe, ctx.group = probe, group
        return total

    @staticmethod
    def backward(ctx, g):
        ctx.probe.measure(*ctx.saved_tensors, g, ctx.group)
        return g, None, None, None


def attach_probes(
    model: torch.nn.Module, candidates: tuple[Codec, ...], joined: bool = False, predictor: str | None = None
) -> list[Probe]:
    """A probe at every place of the model; `remove_compression` takes them away.

    joined: each layer's MLP also measures the message that carries attention's partial sum too.
    predictor: a file; its layers take what they predict off what a probe sees.
    """
    remove_compression(model)
    # With a policy that compresses, every place lets itself be attached to.
    policy = CompressionPolicy(codec="mxfp4", algorithm="gather_sum", min_bytes=0, predictor=predictor)
    if predictor:
        apply_compression(model, policy)
    predictors = {(each.layer, each.site): each.predictor for each in reducers(model)}
    probes = []
    for place in find_places(model):
        probes.append(Probe(policy, place, candidates, predictors.get((place.layer, place.site))))
        place.attach(probes[-1])
    if joined:
        attention = {probe.layer: probe for probe in probes if probe.site == "attention"}
        for probe in probes:
            probe.attention = attention.get(probe.layer) if probe.site == "mlp" else None
    return probes


def measure_window(model: torch.nn.Module, window: torch.Tensor, number: int) -> None:
    """One forward and one backward of `window` `[tokens]`; the model's probes do the rest. number: the window's.

    Raises NotFiniteError for logits that are not finite.
    """
    with torch.enable_grad():
        said = differentiable_logits(model, window[None])[0, :-1]
    said.backward(_score(said.detach(), model.embedding.word_embeddings, number).to(said.dtype))


def _score(logits: torch.Tensor, embedding, number: int) -> torch.Tensor:
    """Gradient of drawn tokens' log-probability with respect to `logits` `[tokens, vocabulary of this rank]`."""
    start, group = embedding.vocab_start_index, embedding.tp_group
    log_probs = Prediction.of(logits, start, group).log_probs
    # The largest of log-probability plus Gumbel noise is a draw; ranks have noise of their own for their own tokens.
    generator = torch.Generator(logits.device).manual_seed(SEED + number * group.size() + group.rank())
    noise = torch.empty_like(log_probs).exponential_(generator=generator).log()
    drawn = Prediction.of(log_probs - noise, start, group).best - start
    score = -log_probs.exp()
    mine = ((drawn >= 0) & (drawn < logits.shape[1])).nonzero()[:, 0]
    score[mine, drawn[mine]] += 1
    return score
