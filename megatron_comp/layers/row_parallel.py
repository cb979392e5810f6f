"""Megatron's `RowParallelLinear` with a compressed reduction."""

import torch
from megatron.core.tensor_parallel import RowParallelLinear

from ..policy import CompressionPolicy
from ..wire import exchange
from ..wire.codec import CodecPair, parse_codec
from .site import ReductionSite

# Megatron names the place of a linear by the buffer that Transformer Engine would use for it.
SITE_OF_BUFFER = {"proj": "attention", "fc2": "mlp"}


class CompressedRowParallelLinear(RowParallelLinear):
    """`y = x @ W.T`, W split along its input, the ranks' partial sums reduced as a policy says.

    x `[sequence, batch, input / N]`; y `[sequence, batch, output]`, with sequence parallelism `[sequence / N, ...]`.
    Weights, checkpoints and bias handling are the stock class's. In a hand-written layer spec, give `policy=` (as
    `ModuleSpec(module=..., params={"policy": policy})`, or `functools.partial` where Megatron calls builders directly);
    without one it does what the stock class does until `apply_compression` gives it one.

    policy: must not have `layers` or `phases`, which a linear alone cannot tell: those are for `apply_compression`.
    site: a policy's name of the place; taken from `tp_comm_buffer_name` where Megatron gives that.
    """

    def __init__(self, *args, policy: CompressionPolicy | None = None, site: str | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.reduction: ReductionSite | None = None
        if policy is None:
            return
        site = site or SITE_OF_BUFFER.get(kwargs.get("tp_comm_buffer_name"))
        if site is None:
            raise ValueError("CompressedRowParallelLinear cannot tell its place here: give site='attention' or 'mlp'")
        if self.config.num_moe_experts:
            raise ValueError(
                "a linear in a spec cannot tell shared experts from an MLP; use apply_compression on the model"
            )
        if unknown := [key for key in ("layers", "phases") if getattr(policy, key)]:
            raise ValueError(
                f"policy: {unknown[0]}: a linear in a spec knows no layer number and no phase; "
                "use apply_compression on the model"
            )
        self.attach(ReductionSite(policy, None, site))

    def attach(self, reduction: ReductionSite) -> None:
        """Reduce through `reduction` from now on. Raises ValueError for a linear that cannot be compressed."""
        check_reducible(self, reduction.codec_names())
        # Megatron's switch for "somebody else reduces": its forward then returns the partial sum.
        self.explicit_expert_comm = True
        self.reduction = reduction

    def detach(self) -> None:
        """Back to the stock reduction."""
        self.explicit_expert_comm = False
        self.reduction = None

    def forward(self, input_: torch.Tensor):
        if self.reduction is None:
            return super().forward(input_)
        # Not where sums never go in parts: the tensor that tells their shape would be allocated for nothing. A decoded
        # token of each request is one part; asking costs 4 us, of some 90 that a linear's Python takes.
        in_parts = input_.shape[0] > 1 and exchange.overlap_bytes(input_.device.type) and self.reduction.takes_parts
        if in_parts:
            out = input_.new_empty(*input_.shape[:-1], self.output_size)
            rows = self.part_rows(out)
            if len(rows) > 1:
                inputs = input_.reshape(-1, 1, input_.shape[-1]).split(rows)
                partials = (super(CompressedRowParallelLinear, self).forward(each)[0] for each in inputs)
                return self.reduction.reduce_parts(partials, out, self.tp_group), self.bias
        output, bias = super().forward(input_)
        reduce = self.reduction.reduce_scatter if self.sequence_parallel else self.reduction.reduce
        return reduce(output, self.tp_group, self.training), bias

    def part_rows(self, out: torch.Tensor) -> list[int]:
        """Rows of the parts that may be computed and sent one by one; a single part where they may not.

        Not decoded tokens, which are too few; not where a backward would have to know of the parts, where autocast
        makes a type that only the result tells, or under sequence parallelism, where every part would have rows of all
        ranks' slices. out: of the shape, type and device of what all parts give.
        """
        rows = out.shape[:-1].numel()
        whole = torch.is_grad_enabled() or self.sequence_parallel or torch.is_autocast_enabled(out.device.type)
        if whole or rows < 2 * exchange.ALIGNMENT:
            return [rows]
        return self.reduction.part_rows(out, self.tp_group)


def check_reducible(linear: RowParallelLinear, codecs: set[str]) -> None:
    """Raises ValueError for a linear whose partial sums cannot be reduced after its forward, or not in these codecs."""
    check_one_codec(codecs, linear.sequence_parallel)
    if not linear.skip_bias_add:
        raise ValueError(
            f"{linear} adds its bias itself; compression needs skip_bias_add=True, as Megatron's layers have"
        )
    if linear.is_expert:
        raise ValueError(f"{linear} belongs to an expert, whose partial sums the token dispatcher reduces")


def check_one_codec(codecs: set[str], sequence_parallel: bool) -> None:
    """Raises ValueError for two codecs where there is one phase."""
    if sequence_parallel and (pairs := [name for name in codecs if isinstance(parse_codec(name), CodecPair)]):
        raise ValueError(f"policy: {pairs[0]!r}: sequence parallelism reduces in one phase and takes one codec")
