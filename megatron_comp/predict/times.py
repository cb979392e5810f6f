# SPDX-License-Identifier: Apache-2.0
"""Time of a prompt's prefill or of one decoded token: a roofline of the compute, and the predicted times of the sums.

    compute   for each layer  max(flops / N / reached peak, bytes of weights / N / reached memory rate, launches)
              flops: 2 per token and weight (of an MoE, of the experts that a token takes), and attention's 2 T^2 per
              head value, half of the square since attention is causal; the vocabulary's head for one token per prompt
    decode    the same of one token per prompt: attention's flops are 4 T per head value, and the keys and values of
              T tokens are read beside the weights
    sums      `megatron_comp.wire.cost`, for each layer and site as the policy decides; a dropped one takes nothing

The two follow each other, as in Megatron's stock layers. On a CPU layers overlap them (`compressed_layer.py`): of a sum
in n parts the wire then takes 1/n, as long as the MLPs' compute is not shorter than what it hides.
"""

import math
from dataclasses import dataclass

from ..policy import DROP, CompressionPolicy
from ..wire.calibration import Calibration
from ..wire.codec import Codec, CodecPair
from ..wire.cost import choose_algorithm, choose_parts, stock_seconds, sum_seconds, wire_and_work
from ..wire.topology import Islands
from .hardware import Gpu, Shares
from .models import Model


@dataclass(frozen=True)
class Job:
    """`batch` prompts of `tokens` each on `tp` ranks: their prefill, or the decoding of one token after each."""

    model: Model
    tp: int
    batch: int
    tokens: int
    itemsize: int = 2
    phase: str = "prefill"

    @property
    def shape(self) -> tuple[int, int]:
        """Of the tensor that is summed."""
        return (self.batch * (self.tokens if self.phase == "prefill" else 1), self.model.hidden)

    @property
    def nbytes(self) -> int:
        """Of that tensor."""
        return math.prod(self.shape) * self.itemsize

    @property
    def cached_values(self) -> int:
        """Keys and values of one layer, those that ranks hold twice counted twice."""
        copies = max(1, self.tp // self.model.kv_heads)
        return 2 * self.batch * self.tokens * self.model.kv_heads * self.model.head_dim * copies


def compute_seconds(job: Job, gpu: Gpu, shares: Shares, chunks: int = 1) -> float:
    """Of everything but the sums, on one rank. chunks: of the prompts, each of which reads all weights again."""
    model, rows, decodes = job.model, job.shape[0] / chunks, job.phase == "decode"
    attention = (4 if decodes else 2) * rows * job.tokens * model.heads * model.head_dim
    touched, taken = max(model.experts, 1), max(model.active, 1)
    weights = model.attention_weights + min(touched, taken * rows) * model.mlp_weights
    layer = _roofline(
        2 * rows * (model.attention_weights + taken * model.mlp_weights) + attention,
        weights + (job.cached_values if decodes else 0),
        job,
        gpu,
        shares,
    )
    head = model.hidden * model.vocab
    layers = chunks * model.layers * max(layer, shares.layer_us * 1e-6)
    return layers + _roofline(2 * job.batch * head, head, job, gpu, shares)


def _roofline(flops: float, values: float, job: Job, gpu: Gpu, shares: Shares) -> float:
    """values: that are read from memory."""
    work = flops / job.tp / (gpu.tflops * 1e12 * shares.compute)
    return max(work, values * job.itemsize / job.tp / (gpu.memory_gb_s * 1e9 * shares.memory))


def logits_seconds(job: Job, policy: CompressionPolicy, calibration: Calibration) -> float:
    """Of the gather of a decoded token's logits, as the policy's `logits` says."""
    return calibration.links["all_gather"].seconds(logits_bytes(job, policy.logits)) if job.tp > 1 else 0.0


def logits_bytes(job: Job, candidates: int | None) -> int:
    """That each rank receives for a decoded token of each prompt: all logits of the others, or so many with their
    indices where these are fewer bytes."""
    of_rank = -(-job.model.vocab // job.tp) * job.itemsize
    if candidates is not None:
        of_rank = min(of_rank, candidates * (job.itemsize + 4))
    return job.batch * (job.tp - 1) * of_rank


@dataclass(frozen=True)
class Sums:
    """The sums of one forward."""

    seconds: float
    compressed: int
    dropped: int
    algorithms: frozenset[str]


def sums(
    job: Job,
    policy: CompressionPolicy,
    calibration: Calibration,
    compute: float = 0.0,
    islands: Islands | None = None,
) -> Sums:
    """Every layer's and site's, as the policy decides. compute: seconds of all else, which may hide some of them.

    islands: of the ranks, for hierarchical sums."""
    seconds, hidden, compressed, dropped, algorithms = 0.0, 0.0, 0, 0, set()
    if job.tp == 1:
        return Sums(0.0, 0, 0, frozenset())
    stock = stock_seconds(job.nbytes, job.tp, calibration)
    for layer in range(job.model.layers):
        for site in job.model.sites:
            decision = policy.decide(
                layer=layer,
                site=site,
                phase=job.phase,
                shape=job.shape,
                itemsize=job.itemsize,
                world_size=job.tp,
                calibration=calibration,
                islands=islands,
            )
            if decision.reason == DROP:
                dropped += 1
            elif decision.codec is None:
                seconds += stock
            else:
                way = choose_algorithm(job.shape, decision.codec, job.tp, decision.algorithm, calibration, islands)
                its_seconds = sum_seconds(job.shape, decision.codec, job.tp, way, calibration, islands)
                seconds += its_seconds
                hidden += its_seconds - _in_parts(job, decision.codec, way, calibration, islands)
                compressed += 1
                algorithms.add(way)
    seconds -= max(0.0, min(hidden, compute * job.model.share_of_mlps))
    return Sums(seconds, compressed, dropped, frozenset(algorithms))


def _in_parts(job: Job, codec: Codec | CodecPair, way: str, calibration: Calibration, islands: Islands | None) -> float:
    """Seconds of a sum that its layer does not compute in, if there is enough to compute."""
    how = job.shape, codec, job.tp, way, calibration
    parts = 1 if job.model.experts else choose_parts(*how, calibration.device, islands)
    if parts == 1:
        return sum_seconds(*how, islands)
    wire, work = wire_and_work(*how, parts, islands)
    return work + wire / parts
