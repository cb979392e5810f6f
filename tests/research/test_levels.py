# SPDX-License-Identifier: Apache-2.0
"""Lloyd's method finds the levels that `wire/formats.py` has."""

import pytest
import torch

from megatron_comp.wire.formats import ELEMENTS
from research import levels


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_the_elements_are_what_the_method_ends_with(bits):
    """A turn from there moves no level by more than a unit and a half: they are whole units, and means of blocks."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    element = ELEMENTS[f"lloyd{bits}"]
    top = element.magnitudes[-1]
    now = torch.tensor(element.magnitudes) / top
    assert ((levels.improved(x, now, 64, 1) - now).abs() * top).max() < 1.5
    assert levels.squared_error(x, element, 64) < levels.squared_error(x, ELEMENTS[f"int{bits}"], 64)


def test_each_turn_errs_less():
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(2))
    first = levels.even(4)
    errors = [levels.squared_error(x, levels._trial(levels.improved(x, first, 64, turns)), 64) for turns in (0, 2, 8)]
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.85 * errors[0]
