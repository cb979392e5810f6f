# SPDX-License-Identifier: Apache-2.0
"""The magnitudes of the elements `lloyd2` to `lloyd5`: those of least squared error for normally distributed values.

    python -m research.levels

Lloyd's method (IEEE Trans. Inf. Theory 28, 1982): values choose the nearest level, each level becomes the mean of the
values that chose it, and so on. A value counts by its block's scale squared, and `search` chooses the scales anew in
each turn. Prints what blocks of 32, 64 and 128 values come to, their mean in units of `wire/formats.py`, and the
squared error of the elements as they are, relative to that of the integers of as many bits. Some minutes of one core.
"""

import argparse

import torch

from megatron_comp.wire import reference
from megatron_comp.wire.formats import ELEMENTS, SCALES, Element, Format, Levels

BLOCKS = (32, 64, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--values", type=int, default=1 << 18, help="how many are drawn (default 262,144)")
    parser.add_argument("--turns", type=int, default=30, help="of Lloyd's method (default 30)")
    args = parser.parse_args()
    x = torch.randn(args.values // 256, 256, generator=torch.Generator().manual_seed(0))
    for bits in range(2, 6):
        element = ELEMENTS[f"lloyd{bits}"]
        top = element.magnitudes[-1]
        found = [improved(x, even(bits), block, args.turns) * top for block in BLOCKS]
        for block, levels in zip(BLOCKS, found):
            print(f"{bits} bits, blocks of {block}: " + " ".join(f"{level:.2f}" for level in levels.tolist()))
        print(f"{bits} bits, mean: " + " ".join(f"{level:.0f}" for level in torch.stack(found).mean(0).tolist()))
        print(f"{element.name}: " + " ".join(map(str, element.magnitudes)))
        for block in BLOCKS:
            ours, others = (squared_error(x, ELEMENTS[name], block) for name in (element.name, f"int{bits}"))
            print(f"{element.name}, blocks of {block}: {ours / others - 1:+.1%} against int{bits}")


def even(bits: int) -> torch.Tensor:
    """Magnitudes 1, 3, 5, ... of levels at equal distances, the largest one 1."""
    levels = torch.arange(1, 2**bits, 2)
    return levels / levels[-1]


def improved(x: torch.Tensor, levels: torch.Tensor, block: int, turns: int) -> torch.Tensor:
    """`levels` after so many turns, the largest one 1."""
    for _ in range(turns):
        codes, scales = encoded(x, _trial(levels), block)
        sums = torch.zeros_like(levels).index_add_(0, codes, scales * x.abs().flatten())
        levels = sums / torch.zeros_like(levels).index_add_(0, codes, scales.square())
        levels = levels / levels[-1]
    return levels


def _trial(levels: torch.Tensor) -> Levels:
    """An element that never travels, so that its levels need not be integers."""
    return Levels("trial", tuple(levels.tolist()), 1.0)  # type: ignore[arg-type]


def encoded(x: torch.Tensor, element: Element, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each value's magnitude code, and the scale of its block: both of one dimension."""
    fields, scales = _fields(x, element, block)
    return (fields["payload"].long() % (1 << element.bits - 1)).flatten(), scales.flatten()


def squared_error(x: torch.Tensor, element: Element, block: int) -> float:
    fields, scales = _fields(x, element, block)
    return (torch.tensor(element.table)[fields["payload"].long()] * scales - x).square().mean().item()


def _fields(x: torch.Tensor, element: Element, block: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What `x` would travel as, and each value's scale, like `x`."""
    fmt = Format(element, block, SCALES["e5m3"], search=True)
    fields = reference._encode_tile(x, fmt)
    return fields, reference.scale_values(fields["scale"], fmt, None).repeat_interleave(block, dim=1)


if __name__ == "__main__":
    main()
