# SPDX-License-Identifier: Apache-2.0
"""The one way in which partial results are summed, whatever module they come from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from ..policy import DROP, PHASES, CompressionPolicy
from ..wire import exchange
from ..wire.calibration import ASSUMED
from ..wire.collectives import PendingAllReduce, run
from .compiled import register
from .mappings import sum_by_plan
from .meter import UNTIMED, Meter
from .plans import Choice, Plans
from .predictor import SitePredictor

Group = torch.distributed.ProcessGroup


@dataclass(slots=True)
class Phase:
    """What the model is doing, shared by all its sums: `prefill` or `decode`."""

    name: str = "prefill"


class Reducer:
    """Sums the partial results of one place over `group`: looks up what the policy says, counts, and sums.

    layer: number over the whole model, from 0; None where it is unknown.
    timing: the meter also takes seconds, for which every sum waits for the device.
    allow_training: let gradients through compressed sums in training mode (backward as Megatron's).
    plans: shared by all sums of a model over one group; without it the reducer has its own, which assume a link.
    predictor: of this place's sum; only its layer's forward, which has the block's input, can use it.
    """

    def __init__(
        self,
        policy: CompressionPolicy,
        layer: int | None,
        site: str,
        group: Group,
        phase: Phase | None = None,
        *,
        timing: bool = False,
        allow_training: bool = False,
        plans: Plans | None = None,
        predictor: SitePredictor | None = None,
    ) -> None:
        self.layer, self.site, self.group = layer, site, group
        self.phase, self.plans, self.allow_training = phase or Phase(), plans or Plans(policy, ASSUMED), allow_training
        self.meter, self.predictor = Meter(layer, site, timing), predictor
        self.words = {phase: policy.word(layer, site, phase) for phase in PHASES}
        self.codecs = {policy.codec_name(layer, site, phase) for phase in PHASES} - {"none"}
        """Names of the codecs that this place compresses in, in one phase or another."""
        self.drops = DROP in self.words.values() and group.size() > 1
        """Whether the sum is left out; the layer then adds its partial results to those of the MLP."""
        self.handle = register(self)

    def __call__(
        self,
        partial: torch.Tensor,
        scatter: bool = False,
        training: bool = False,
        splits: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """`[..., hidden]` partial sum to the sum over the group, equal on all ranks.

        scatter: to this rank's slice of that sum instead, along dim 0 of `[rows, ..., hidden]`.
        splits: rows of each rank's slice; without it all slices are equal.
        training: whether the module is in training mode.

        Raises RuntimeError if gradients would pass a compressed sum in training mode, and for a dropped sum.
        """
        if torch.compiler.is_compiling():
            self._refuse_training(partial, training)
            return torch.ops.megatron_comp.reduce(partial, self.handle, scatter, splits)
        choice = self.plans.get(self.words[self.phase.name], partial.shape, partial, self.group, scatter, splits)
        plan = choice.plan
        if training and plan is not None:
            self._refuse_training(partial, training)
        elif choice.reason == DROP:
            raise RuntimeError(
                f"layer {self.layer}: {self.site}'s sum is dropped; only its layer's forward can do that"
            )
        traffic = self.meter.record(choice, partial.is_cuda)
        with self.meter.clock(traffic) if self.meter.timing else UNTIMED:
            if plan is None:
                return _stock_sum(partial, self.group, scatter, splits)
            if partial.requires_grad:
                return sum_by_plan(partial, plan, self.group, splits)
            return run(plan, partial, self.group)

    def choose(
        self, shape: Sequence[int], like: torch.Tensor, scatter: bool = False, splits: Sequence[int] | None = None
    ) -> Choice:
        """What a sum of this shape does; `like` has its type and device."""
        return self.plans.get(self.words[self.phase.name], torch.Size(shape), like, self.group, scatter, splits)

    def predictor_of(self, x: torch.Tensor) -> SitePredictor | None:
        """What predicts a sum of the shape of `x`, the block's input `[..., hidden]`; None where nothing does.

        A sum that is neither compressed nor dropped needs no prediction: what travels is exact.
        """
        return self.predictor if self.predictor and (self.drops or self.choose(x.shape, x).plan) else None

    def part_rows(self, shape: Sequence[int], like: torch.Tensor) -> list[int]:
        """Rows of the parts in which a sum of this shape is computed and sent; a single part where it goes whole.

        Decoded tokens go whole, being too few. So does everything where a backward would have to know of the parts,
        and where autocast makes a type that only the result tells.
        """
        rows = torch.Size(shape[:-1]).numel()
        if rows < 2 * exchange.ALIGNMENT or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return [rows]
        device = like.device.type
        if exchange.overlap_bytes(device) is None or torch.is_autocast_enabled(device):
            return [rows]
        in_parts = self.choose(shape, like).in_parts
        return in_parts.row_counts if in_parts else [rows]

    def begin(self, out: torch.Tensor) -> "SumInParts":
        """A sum into `out` `[..., hidden]` whose parts, of so many rows as `part_rows` says, are still to be pushed."""
        choice = self.choose(out.shape, out)
        return SumInParts(out, choice, self.group, self.meter)

    def _refuse_training(self, partial: torch.Tensor, training: bool) -> None:
        if training and partial.requires_grad and torch.is_grad_enabled() and not self.allow_training:
            raise RuntimeError(
                f"layer {self.layer} {self.site}: a compressed reduction in training mode; call model.eval(), or "
                "apply_compression(..., allow_training=True) if gradients are to pass it as if nothing were rounded"
            )


class SumInParts:
    """One sum whose rows come in parts and leave in parts. Iterating gives the sums `[rows, hidden]` as they arrive.

    It counts as one call; its seconds are those in which nothing else was computed.
    """

    def __init__(self, out: torch.Tensor, choice: Choice, group: Group, meter: Meter) -> None:
        assert choice.in_parts is not None, "this sum goes in one piece"
        self.out = out
        self._pending = PendingAllReduce(out, choice.in_parts, group)
        self._meter, self._traffic = meter, meter.record(choice, out.is_cuda)

    def push(self, partial: torch.Tensor) -> None:
        """The next rows. They are on their way when this returns."""
        with self._meter.clock(self._traffic):
            self._pending.push(partial)
            self._pending.advance()

    def __iter__(self) -> Iterator[torch.Tensor]:
        while (part := self._take()) is not None:
            yield part

    def wait(self) -> torch.Tensor:
        """All of the sum."""
        with self._meter.clock(self._traffic):
            return self._pending.wait()

    def _take(self) -> torch.Tensor | None:
        with self._meter.clock(self._traffic):
            return self._pending.take()


def _stock_sum(partial: torch.Tensor, group: Group, scatter: bool, splits: Sequence[int] | None) -> torch.Tensor:
    if scatter:
        return reduce_scatter_to_sequence_parallel_region(partial, group=group, input_split_sizes=splits)
    # Megatron 0.16 reduces a contiguous copy of other tensors, and returns what it was given.
    return reduce_from_tensor_model_parallel_region(partial.contiguous(), group=group)
