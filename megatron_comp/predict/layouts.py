# SPDX-License-Identifier: Apache-2.0
"""Ways to lay a model out over machines, and the predicted times of each.

    TP = N                  compute of N ranks + sums over all of them
    TP = L, PP = M          compute of L ranks + sums over L ranks inside a machine
                            + prefill: (M - 1) activations that cross;  decode: the same, and a flight for the new token
    one machine, TP = L     the same without what crosses

A stage holds an M-th of the layers, so that one request goes through as much compute as on one machine, in sequence. An
activation is [tokens, hidden] in 16 or 32 bits, as it is: it crosses once, in parts over the cards. Prompts are not
cut into chunks that fill the stages, and no second request fills them either: a loaded pipeline is faster than this.

Memory of a GPU: its share of the weights, and of the keys and values of all tokens; 10 % stay free for the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..policy import CompressionPolicy
from ..wire.calibration import Calibration, Link
from ..wire.codec import Codec
from ..wire.topology import Islands
from .hardware import Gpu, Shares, assumed_calibration
from .machines import Machines
from .times import Job, Sums, sums

FREE = 0.1


@dataclass(frozen=True)
class Layout:
    """calibration: of `tp` ranks, which are on `islands`. boundary: between two of the stages."""

    name: str
    tp: int
    calibration: Calibration
    islands: Islands | None = None
    stages: int = 1
    boundary: Link | None = None

    def beside_compute(self, job: Job, policy: CompressionPolicy, compute: float) -> tuple[float, Sums]:
        """(seconds of all but compute, the sums among it) of a job whose `tp` is this layout's."""
        made = sums(job, policy, self.calibration, compute, self.islands)
        if self.boundary is None:
            return made.seconds, made
        crossings = (self.stages - 1) * self.boundary.seconds(job.nbytes)
        return made.seconds + crossings + (self.boundary.latency_s if job.phase == "decode" else 0.0), made

    def memory_bytes(self, job: Job) -> float:
        """Of each GPU."""
        model = job.model
        values = model.weights + model.layers * replace(job, tp=self.tp).cached_values
        return values * job.itemsize / (self.tp * self.stages)

    def fits(self, job: Job, gpu: Gpu) -> bool:
        return self.memory_bytes(job) <= (1 - FREE) * gpu.memory_gb * 1e9


def layouts_of(machines: Machines, gpu: Gpu, shares: Shares, codecs: Sequence[Codec], job: Job) -> list[Layout]:
    """Tensor parallel over all ranks first; then one machine, if the model fits it, and a pipeline of machines."""
    per_machine = machines.gpus
    inside = assumed_calibration(gpu, machines.inside, shares, codecs, per_machine, job.itemsize)
    whole = machines.calibration(gpu, shares, codecs, job.itemsize)
    made = [Layout(f"TP={machines.ranks}", machines.ranks, whole, machines.islands)]
    one = Layout(f"one machine, TP={per_machine}", per_machine, inside)
    if one.fits(job, gpu):
        made.append(one)
    if job.model.layers >= machines.count:
        name = f"PP={machines.count}, TP={per_machine}"
        made.append(Layout(name, per_machine, inside, stages=machines.count, boundary=machines.boundary))
    return made
