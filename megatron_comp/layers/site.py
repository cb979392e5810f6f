"""One place that sums partial results: it asks the policy, reduces, and counts what it sent."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch
from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from ..policy import PHASES, CompressionPolicy, Decision
from ..wire import exchange
from ..wire.codec import Codec
from ..wire.collectives import PendingAllReduce
from ..wire.cost import (
    choose_algorithm,
    choose_chunks,
    choose_parts,
    received_bytes,
    received_bytes_scatter,
    ring_bytes,
    step_codecs,
)
from ..wire.figures import ASSUMED, Figures
from .mappings import (
    compressed_reduce_from_tensor_model_parallel_region,
    compressed_reduce_scatter_to_sequence_parallel_region,
)

# Shapes whose decisions a site keeps: a prompt's length makes one, and every decoded token of a batch has another's.
KNOWN_SHAPES = 256


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
    """

    policy: CompressionPolicy
    layer: int | None
    site: str
    phase: Phase = field(default_factory=Phase)
    timing: bool = False
    allow_training: bool = False
    figures: Figures = ASSUMED
    stats: SiteStats = field(init=False)
    takes_parts: ClassVar[bool] = True
    """Whether a linear may give its output in parts, by `reduce_parts`."""
    _decisions: dict[tuple, Decision] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.stats = SiteStats(self.layer, self.site)

    def reduce(self, partial: torch.Tensor, group: torch.distributed.ProcessGroup, training: bool) -> torch.Tensor:
        """`[..., hidden]` partial sum to the sum over `group`, equal on all ranks."""
        decision = self._decide(partial, group)
        if decision.codec is None:
            return self._timed(
                self._keep(partial, group.size(), 2, decision),
                # Megatron 0.16 reduces a contiguous copy of other tensors, and returns what it was given.
                lambda: reduce_from_tensor_model_parallel_region(partial.contiguous(), group=group),
            )
        self._refuse_training(partial, training)
        codec, algorithm = decision.codec, decision.algorithm
        return self._timed(
            self._compress(partial, group, decision),
            lambda: compressed_reduce_from_tensor_model_parallel_region(
                partial, codec, group, algorithm, decision.chunks
            ),
        )

    def part_rows(self, partial: torch.Tensor, group: torch.distributed.ProcessGroup) -> list[int]:
        """Rows of the parts in which a sum may go; a single part where it goes in one piece.

        partial: of the partial sum's shape, type and device; its values are not read.
        """
        return exchange.chunk_rows(partial.shape[:-1].numel(), group.size(), self._decide(partial, group).parts)

    def reduce_parts(
        self,
        parts: Iterable[torch.Tensor],
        rows: Sequence[int],
        out: torch.Tensor,
        group: torch.distributed.ProcessGroup,
    ) -> torch.Tensor:
        """What `reduce` gives of all parts, in `out` `[..., hidden]`. Each is on its way while the next is computed.

        rows: of each part, from `part_rows`. Counted as one call; seconds are those that nothing was computed in.
        """
        pending, traffic = self._begin(out, rows, group)
        for part in parts:
            self._push(part, pending, traffic)
        return self._end(pending, out, traffic)

    def reduce_scatter(
        self,
        partial: torch.Tensor,
        group: torch.distributed.ProcessGroup,
        training: bool,
        splits: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """`[rows, ..., hidden]` partial sum to this rank's slice, along dim 0, of the sum over `group`.

        splits: rows of each rank's slice; without it all are equal.
        """
        decision = self._decide(partial, group, scatter=True)
        if decision.codec is None:
            return self._timed(
                self._keep(partial, group.size(), 1, decision),
                lambda: reduce_scatter_to_sequence_parallel_region(partial, group=group, input_split_sizes=splits),
            )
        self._refuse_training(partial, training)
        codec: Codec = decision.codec
        self.stats.algorithms["reduce_scatter"] += 1
        traffic = self.stats.compressed
        traffic.message_bytes += codec.message_bytes(partial.shape)
        traffic.received_bytes += received_bytes_scatter(partial.shape, codec, group.size(), group.rank(), splits)
        return self._timed(
            _count(traffic, partial),
            lambda: compressed_reduce_scatter_to_sequence_parallel_region(partial, codec, group, splits),
        )

    def turned(self, cls: type["ReductionSite"], **more) -> "ReductionSite":
        """The same place as one of a subclass, whose counters start at zero."""
        return cls(**{each.name: getattr(self, each.name) for each in fields(self) if each.init}, **more)

    def codec_names(self) -> set[str]:
        """Names of the codecs that this place compresses in, in one phase or another."""
        return {self.policy.codec_name(self.layer, self.site, phase) for phase in PHASES} - {"none"}

    def _decide(self, partial: torch.Tensor, group: torch.distributed.ProcessGroup, scatter: bool = False) -> Decision:
        """The policy's answer, `auto` resolved; kept, since a decoded token asks it for every reduction."""
        key = (self.phase.name, partial.shape, partial.dtype, group.size(), scatter)
        decision = self._decisions.get(key)
        if decision is None:
            if len(self._decisions) >= KNOWN_SHAPES:
                self._decisions.clear()
            decision = self._decisions[key] = self._ask(partial, group.size(), scatter)
        return decision

    def _ask(self, partial: torch.Tensor, ranks: int, scatter: bool) -> Decision:
        decision = self.policy.decide(
            layer=self.layer,
            site=self.site,
            phase=self.phase.name,
            shape=partial.shape,
            itemsize=partial.element_size(),
            world_size=ranks,
            figures=self.figures,
            scatter=scatter,
        )
        if decision.codec is None or scatter:
            return decision
        algorithm = choose_algorithm(partial.shape, decision.codec, ranks, decision.algorithm, self.figures)
        how = partial.shape, decision.codec, ranks, algorithm, self.figures
        chunks = choose_chunks(*how, exchange.chunk_bytes(partial.device))
        return replace(decision, algorithm=algorithm, chunks=chunks, parts=choose_parts(*how, partial.device))

    def _begin(
        self, out: torch.Tensor, rows: Sequence[int], group: torch.distributed.ProcessGroup
    ) -> tuple[PendingAllReduce, Traffic]:
        """A sum into `out`, the parts of which are still to be pushed; counted now."""
        decision = self._decide(out, group)
        pending = PendingAllReduce(out, rows, decision.codec, group, decision.algorithm)
        return pending, self._compress(out, group, decision)

    def _push(self, part: torch.Tensor, pending: PendingAllReduce, traffic: Traffic) -> None:
        def push() -> None:
            pending.push(part)
            pending.advance()

        self._timed(traffic, push)

    def _end(self, pending: PendingAllReduce, out: torch.Tensor, traffic: Traffic) -> torch.Tensor:
        """What is returned of a sum into `out` whose parts are all on their way."""
        return self._timed(traffic, pending.wait)

    def _keep(self, partial: torch.Tensor, ranks: int, passes: int, decision: Decision) -> Traffic:
        nbytes = partial.numel() * partial.element_size()
        self.stats.kept_because[decision.reason] += 1
        self.stats.kept.message_bytes += nbytes
        self.stats.kept.received_bytes += ring_bytes(nbytes, ranks, passes)
        return _count(self.stats.kept, partial)

    def _compress(self, partial: torch.Tensor, group: torch.distributed.ProcessGroup, decision: Decision) -> Traffic:
        """Counts a compressed all-reduce of a tensor of this shape."""
        self.stats.algorithms[decision.algorithm] += 1
        traffic, shape, codec = self.stats.compressed, partial.shape, decision.codec
        traffic.message_bytes += sum(each.message_bytes(shape) for each in step_codecs(codec)) // 2
        traffic.received_bytes += received_bytes(shape, codec, group.size(), decision.algorithm, group.rank())
        return _count(traffic, partial)

    def _refuse_training(self, partial: torch.Tensor, training: bool) -> None:
        if training and partial.requires_grad and torch.is_grad_enabled() and not self.allow_training:
            raise RuntimeError(
                f"layer {self.layer} {self.site}: a compressed reduction in training mode; call model.eval(), or "
                "apply_compression(..., allow_training=True) if gradients are to pass it as if nothing were rounded"
            )

    def _timed(self, traffic: Traffic, reduction) -> torch.Tensor:
        if not self.timing:
            return reduction()
        wait_for_device()
        start = time.perf_counter()
        result = reduction()
        wait_for_device()
        traffic.seconds += time.perf_counter() - start
        return result


def _count(traffic: Traffic, partial: torch.Tensor) -> Traffic:
    traffic.calls += 1
    traffic.values += partial.numel()
    return traffic


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
