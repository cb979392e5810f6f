"""One place that sums partial results: it asks the policy, reduces, and counts what it sent."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch
from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from ..policy import PHASES, CompressionPolicy
from ..wire.collectives import PendingAllReduce
from ..wire.figures import ASSUMED, Figures
from ..wire.plan import SumPlan
from .mappings import sum_by_plan
from .plans import Choice, Plans

Group = torch.distributed.ProcessGroup


@dataclass(slots=True)
class Traffic:
    """What some reductions sent. Bytes and seconds are those of this rank."""

    calls: int = 0
    values: int = 0
    message_bytes: int = 0
    """Of the summed tensors, each counted once, as they travel."""
    received_bytes: int = 0
    """From the other ranks: counted for compressed reductions, that of a ring for stock ones."""
    seconds: float = 0.0
    """Zero unless timing was asked for."""

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(getattr(self, name) + getattr(other, name) for name in Traffic.__slots__))


@dataclass(slots=True)
class SiteStats:
    """Reductions of one site of one layer: compressed ones, and those that the policy kept and why."""

    layer: int | None
    site: str
    compressed: Traffic = field(default_factory=Traffic)
    kept: Traffic = field(default_factory=Traffic)
    kept_because: Counter = field(default_factory=Counter)
    algorithms: Counter = field(default_factory=Counter)
    """Of the compressed reductions: `gather_sum`, `two_step`, or `reduce_scatter`."""
    captured: int = 0
    """Reductions, of those above, that were recorded into a CUDA graph. Its replays run no Python and are not counted:
    where this is not 0, calls and bytes are those of warm-ups and captures alone."""


@dataclass(slots=True)
class Phase:
    """What the model is doing, shared by all its sites: `prefill` or `decode`."""

    name: str = "prefill"


@dataclass(slots=True)
class ReductionSite:
    """Reduces partial sums of one site of one layer as the policy says.

    layer: number over the whole model, from 0; None where nobody has said it.
    timing: fill in seconds, which makes every call wait for the device.
    allow_training: let gradients through compressed reductions in training mode (backward as Megatron's).
    figures: what predictions rest on, the same on all ranks of the group.
    plans: shared by all sites of a model with this policy and these figures; without it the site has its own.
    """

    policy: CompressionPolicy
    layer: int | None
    site: str
    phase: Phase = field(default_factory=Phase)
    timing: bool = False
    allow_training: bool = False
    figures: Figures = ASSUMED
    plans: Plans | None = None
    stats: SiteStats = field(init=False)
    takes_parts: ClassVar[bool] = True
    """Whether a linear may give its output in parts, by `reduce_parts`."""
    _words: dict[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.stats = SiteStats(self.layer, self.site)
        self.plans = self.plans or Plans(self.policy, self.figures)
        self._words = {phase: self.policy.word(self.layer, self.site, phase) for phase in PHASES}

    def reduce(self, partial: torch.Tensor, group: Group, training: bool) -> torch.Tensor:
        """`[..., hidden]` partial sum to the sum over `group`, equal on all ranks."""
        choice = self.plans.all_reduce(self._words[self.phase.name], partial, group)
        if choice.plan is None:
            return self._run(choice, partial, _stock_all_reduce, partial, group)
        self._refuse_training(partial, training)
        return self._run(choice, partial, sum_by_plan, partial, choice.plan, group)

    def reduce_scatter(
        self, partial: torch.Tensor, group: Group, training: bool, splits: Sequence[int] | None = None
    ) -> torch.Tensor:
        """`[rows, ..., hidden]` partial sum to this rank's slice, along dim 0, of the sum over `group`.

        splits: rows of each rank's slice; without it all are equal.
        """
        choice = self.plans.reduce_scatter(self._words[self.phase.name], partial, group, splits)
        if choice.plan is None:
            return self._run(choice, partial, _stock_reduce_scatter, partial, group, splits)
        self._refuse_training(partial, training)
        return self._run(choice, partial, sum_by_plan, partial, choice.plan, group, splits)

    def part_rows(self, partial: torch.Tensor, group: Group) -> list[int]:
        """Rows of the parts in which a sum may go; a single part where it goes in one piece.

        partial: of the partial sum's shape, type and device; its values are not read.
        """
        in_parts = self._in_parts(partial, group)
        return in_parts.row_counts if in_parts else [partial.shape[:-1].numel()]

    def reduce_parts(self, parts: Iterable[torch.Tensor], out: torch.Tensor, group: Group) -> torch.Tensor:
        """What `reduce` gives of all parts, in `out` `[..., hidden]`. Each is on its way while the next is computed.

        parts: of so many rows each as `part_rows` says. Counted as one call; seconds are those that nothing was
        computed in.
        """
        pending, traffic = self._begin(out, group)
        for part in parts:
            self._push(part, pending, traffic)
        return self._end(pending, out, traffic)

    def turned(self, cls: type["ReductionSite"], **more) -> "ReductionSite":
        """The same place as one of a subclass, whose counters start at zero."""
        return cls(**{each.name: getattr(self, each.name) for each in fields(self) if each.init}, **more)

    def codec_names(self) -> set[str]:
        """Names of the codecs that this place compresses in, in one phase or another."""
        return {self.policy.codec_name(self.layer, self.site, phase) for phase in PHASES} - {"none"}

    def _in_parts(self, partial: torch.Tensor, group: Group) -> SumPlan | None:
        return self.plans.all_reduce(self._words[self.phase.name], partial, group).in_parts

    def _begin(self, out: torch.Tensor, group: Group) -> tuple[PendingAllReduce, Traffic]:
        """A sum into `out`, the parts of which are still to be pushed; counted now."""
        choice = self.plans.all_reduce(self._words[self.phase.name], out, group)
        return PendingAllReduce(out, choice.in_parts, group), self._record(choice, out)

    def _push(self, part: torch.Tensor, pending: PendingAllReduce, traffic: Traffic) -> None:
        def push() -> None:
            pending.push(part)
            pending.advance()

        self._timed(traffic, push)

    def _end(self, pending: PendingAllReduce, out: torch.Tensor, traffic: Traffic) -> torch.Tensor:
        """What is returned of a sum into `out` whose parts are all on their way."""
        return self._timed(traffic, pending.wait)

    def _run(self, choice: Choice, partial: torch.Tensor, function, *args) -> torch.Tensor:
        """Counts the sum and computes it by `function(*args)`."""
        traffic = self._record(choice, partial)
        return self._timed(traffic, function, *args) if self.timing else function(*args)

    def _record(self, choice: Choice, partial: torch.Tensor) -> Traffic:
        stats = self.stats
        if choice.plan is None:
            traffic = stats.kept
            stats.kept_because[choice.reason] += 1
        else:
            traffic = stats.compressed
            stats.algorithms[choice.plan.algorithm] += 1
        traffic.calls += 1
        traffic.values += choice.values
        traffic.message_bytes += choice.message_bytes
        traffic.received_bytes += choice.received_bytes
        if partial.is_cuda and torch.cuda.is_current_stream_capturing():
            stats.captured += 1
        return traffic

    def _refuse_training(self, partial: torch.Tensor, training: bool) -> None:
        if training and partial.requires_grad and torch.is_grad_enabled() and not self.allow_training:
            raise RuntimeError(
                f"layer {self.layer} {self.site}: a compressed reduction in training mode; call model.eval(), or "
                "apply_compression(..., allow_training=True) if gradients are to pass it as if nothing were rounded"
            )

    def _timed(self, traffic: Traffic, function, *args) -> torch.Tensor:
        # Waiting for the device is an error while a CUDA graph is captured, and would time nothing.
        if not self.timing or _is_capturing():
            return function(*args)
        wait_for_device()
        start = time.perf_counter()
        result = function(*args)
        wait_for_device()
        traffic.seconds += time.perf_counter() - start
        return result


def _stock_all_reduce(partial: torch.Tensor, group: Group) -> torch.Tensor:
    # Megatron 0.16 reduces a contiguous copy of other tensors, and returns what it was given.
    return reduce_from_tensor_model_parallel_region(partial.contiguous(), group=group)


def _stock_reduce_scatter(partial: torch.Tensor, group: Group, splits: Sequence[int] | None) -> torch.Tensor:
    return reduce_scatter_to_sequence_parallel_region(partial, group=group, input_split_sizes=splits)


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
