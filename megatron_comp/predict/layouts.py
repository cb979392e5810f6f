# SPDX-License-Identifier: Apache-2.0
"""Ways to lay a model out over machines, and the predicted times of each.

    TP = N                  compute of N ranks + sums over all of them
    TP = L, PP = M          one stage per machine: sums over L ranks inside it; L copies of an activation cross
    PP = N                  one stage per rank, and no sums
    one machine, TP = L     the same as one stage of it all: nothing crosses

A stage holds an equal share of the layers. A prompt goes through P stages in C chunks, as `generate --pp` sends it. If
a stage's compute and sums take s seconds for a chunk,

    prefill   P s + the crossings of one chunk + (C - 1) max(s, the slowest boundary's bytes over its rate)
    decode    compute and sums of the whole model, one after another + the crossings, and a flight for the new token

One request at a time: a pipeline that several requests fill is faster than this. Decoding counts the gather of the
logits over the tensor-parallel ranks, which a policy's `logits` makes smaller; a prefill gathers one token's, next to
nothing.

Memory of a GPU: its share of the weights, and of the keys and values of all tokens; 10 % stay free for the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..inference.chunks import chunk_count
from ..policy import CompressionPolicy
from ..wire.calibration import Calibration, Link
from ..wire.codec import Codec
from ..wire.topology import Islands
from .hardware import Gpu, Shares, assumed_calibration
from .machines import Machines
from .times import Job, Sums, logits_seconds, sums

FREE = 0.1


@dataclass(frozen=True)
class Layout:
    """calibration: of `tp` ranks, which are on `islands`. boundaries: from each stage to the next, for one rank.
    copies: of an activation that a machine receives from others. back: from the last stage to the first."""

    name: str
    tp: int
    calibration: Calibration
    islands: Islands | None = None
    boundaries: tuple[Link, ...] = ()
    copies: int = 0
    back: Link = Link(1.0, 0.0)

    @property
    def stages(self) -> int:
        return len(self.boundaries) + 1

    def chunks(self, job: Job) -> int:
        return chunk_count(job.tokens, self.stages) if job.phase == "prefill" else 1

    def seconds(self, job: Job, policy: CompressionPolicy, compute: float) -> tuple[float, Sums]:
        """(seconds of a job whose `tp` is this layout's, the sums among it). compute: of the whole model's layers, in
        as many chunks as this layout's."""
        chunks = self.chunks(job)
        part = replace(job, tokens=-(-job.tokens // chunks)) if chunks > 1 else job
        of_part = sums(part, policy, self.calibration, compute / chunks, self.islands)
        made = replace(of_part, seconds=chunks * of_part.seconds)
        stage = (compute + made.seconds) / chunks / self.stages
        seconds = self.stages * stage + sum(each.seconds(part.nbytes) for each in self.boundaries)
        if job.phase == "decode":
            back = self.back.latency_s if self.boundaries else 0.0
            return seconds + back + logits_seconds(job, policy, self.calibration), made
        slowest = max([stage, *(part.nbytes / each.bytes_per_s for each in self.boundaries)])
        return seconds + (chunks - 1) * slowest, made

    def seconds_of_link(self, job: Job, policy: CompressionPolicy, compute: float) -> float:
        """What links add to a prefill that takes `compute` seconds where they take no time: sums and crossings."""
        job = replace(job, tp=self.tp)
        if not self.boundaries:
            return sums(job, policy, self.calibration, compute, self.islands).seconds
        part = replace(job, tokens=-(-job.tokens // self.chunks(job)))
        return sum(each.seconds(part.nbytes) for each in self.boundaries)

    def memory_bytes(self, job: Job) -> float:
        """Of each GPU."""
        model = job.model
        values = model.weights + model.layers * replace(job, tp=self.tp).cached_values
        return values * job.itemsize / (self.tp * self.stages)

    def fits(self, job: Job, gpu: Gpu) -> bool:
        return self.memory_bytes(job) <= (1 - FREE) * gpu.memory_gb * 1e9


def layouts_of(machines: Machines, gpu: Gpu, shares: Shares, codecs: Sequence[Codec], job: Job) -> list[Layout]:
    """Tensor parallel over all ranks first; then one machine, if the model fits it, and pipelines of machines and of
    ranks, if there are layers for all stages."""
    count, per_machine, ranks = machines.count, machines.gpus, machines.ranks
    inside = assumed_calibration(gpu, machines.inside, shares, codecs, per_machine, job.itemsize)
    whole = machines.calibration(gpu, shares, codecs, job.itemsize)
    made = [Layout(f"TP={ranks}", ranks, whole, machines.islands)]
    one = Layout(f"one machine, TP={per_machine}", per_machine, inside)
    if one.fits(job, gpu):
        made.append(one)
    if job.model.layers >= count and per_machine > 1:
        across = machines.boundary(per_machine)
        name = f"TP={per_machine}, PP={count}"
        made.append(Layout(name, per_machine, inside, None, (across,) * (count - 1), per_machine, across))
    if job.model.layers >= ranks:
        across = machines.boundary(1)
        links = tuple(machines.boundary_inside if rank % per_machine else across for rank in range(1, ranks))
        made.append(Layout(f"TP=1, PP={ranks}", 1, inside, None, links, 1, across))
    return made


def layouts_of_calibration(known: Calibration, islands: Islands | None, job: Job) -> list[Layout]:
    """All ranks as they were measured; with two levels of links also one rank, and pipelines of machines and of ranks.

    Inside a machine an all-reduce takes two passes of an all-gather.
    """
    ranks = known.ranks
    made = [Layout(f"TP={ranks}", ranks, known, islands)]
    if islands is None or not islands.have_two_levels or not known.inside:
        return made
    near, far = known.inside["all_gather"], known.across["all_gather"]
    count, per_machine = len(islands.members), len(islands.members[0])
    links = known.inside | {"reduce_scatter": near, "all_reduce": Link(near.bytes_per_s, 2 * near.latency_s)}
    inside = replace(known, links=links, measured=dict(known.measured) | {"ranks": per_machine}, inside={}, across={})
    made += [
        Layout("one rank", 1, inside),
        Layout(f"TP={per_machine}, PP={count}", per_machine, inside, None, (far,) * (count - 1)),
    ]
    steps = tuple(near if rank % per_machine else far for rank in range(1, ranks))
    return [*made, Layout(f"TP=1, PP={ranks}", 1, inside, None, steps)]
