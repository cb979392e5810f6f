# SPDX-License-Identifier: Apache-2.0
"""Rows of predictions: a layout of the model under a codec and an algorithm, or under a policy."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..policy import CompressionPolicy
from ..wire.codec import parse_codec
from ..wire.traffic import flat_across, step_codecs
from .hardware import Gpu, Shares
from .layouts import Layout
from .machines import Machines
from .times import Job, compute_seconds


@dataclass(frozen=True)
class Setting:
    """A policy, and what a row calls its codec and its algorithm."""

    codec: str
    algorithm: str
    policy: CompressionPolicy


STOCK = Setting("none", "all_reduce", CompressionPolicy())


def settings_of(names: Sequence[str], layout: Layout) -> list[Setting]:
    """Stock sums, and every codec by every algorithm that it and the layout's ranks can take."""
    able = ["gather_sum", "two_step"]
    if layout.islands and layout.islands.have_two_levels and layout.calibration.inside:
        able.append("hierarchical")
    return [STOCK] + [
        Setting(name, way, CompressionPolicy(codec=name, algorithm=way, min_bytes=0))
        for name in (names if layout.tp > 1 else ())
        for way in (able[1:] if ">" in name else able)
    ]


@dataclass(frozen=True)
class Predictor:
    """Of a job; a layout gives its own number of ranks.

    compute: seconds of a prefill's compute on the job's ranks where that was measured, in place of a GPU; decoding is
    then unknown.
    """

    job: Job
    gpu: Gpu | None
    compute: float | None = None
    machines: Machines | None = None

    def compute_of(self, job: Job, chunks: int = 1) -> float:
        return self.compute or compute_seconds(job, self.gpu, Shares(), chunks)

    def row(self, layout: Layout, setting: Setting) -> dict:
        """Times in milliseconds. Without speed-ups: `with_speedups` adds them."""
        job = replace(self.job, tp=layout.tp)
        seconds, made = layout.seconds(job, setting.policy, self.compute_of(job, layout.chunks(job)))
        algorithm = setting.algorithm
        if algorithm == "policy":
            algorithm = "+".join(sorted(made.algorithms)) or "all_reduce"
        return {
            "layout": layout.name,
            "codec": setting.codec,
            "algorithm": algorithm,
            "rounds": _rounds(layout, setting),
            "bits_per_value": self._bits(setting),
            "ttft_ms": seconds * 1e3,
            "decode_ms": self._decode_ms(layout, setting),
            "share_of_sums": made.seconds / seconds,
            "mb_across": self._mb_across(layout, setting),
            "compressed": made.compressed,
            "kept": 2 * job.model.layers - made.compressed - made.dropped,
            "dropped": made.dropped,
        }

    def _decode_ms(self, layout: Layout, setting: Setting) -> float | None:
        if self.gpu is None:
            return None
        job = replace(self.job, tp=layout.tp, phase="decode")
        return layout.seconds(job, setting.policy, self.compute_of(job))[0] * 1e3

    def _mb_across(self, layout: Layout, setting: Setting) -> float | None:
        """Megabytes that a machine receives from the others in a prefill; None of a policy, and with sums dropped."""
        if self.machines is None or setting.algorithm == "policy" or setting.policy.layers:
            return None
        job = self.job
        if layout.tp < self.machines.ranks:
            return layout.copies * job.nbytes / 1e6
        codec = None if setting.codec == "none" else parse_codec(setting.codec)
        return (
            2 * job.model.layers * self.machines.bytes_across(job.shape, job.itemsize, codec, setting.algorithm) / 1e6
        )

    def _bits(self, setting: Setting) -> float | None:
        """Mean over both phases; None of a policy."""
        if setting.algorithm == "policy":
            return None
        if setting.codec == "none":
            return 8.0 * self.job.itemsize
        return sum(codec.bits_per_value for codec in step_codecs(parse_codec(setting.codec))) / 2


def _rounds(layout: Layout, setting: Setting) -> int | None:
    """How often each value is rounded on its way; None of a policy."""
    if setting.algorithm == "hierarchical":
        return 1 if flat_across(parse_codec(setting.codec), layout.islands) == "gather_sum" else 2
    return {"all_reduce": 0, "gather_sum": 1, "two_step": 2}.get(setting.algorithm)


def with_speedups(rows: list[dict]) -> list[dict]:
    """The rows, with how many times as fast as the first one they are."""
    stock = rows[0]
    for row in rows:
        row["speedup_vs_none"] = stock["ttft_ms"] / row["ttft_ms"]
        row["decode_speedup"] = row["decode_ms"] and stock["decode_ms"] / row["decode_ms"]
    return rows
