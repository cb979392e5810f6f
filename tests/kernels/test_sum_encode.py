# SPDX-License-Identifier: Apache-2.0
"""Several ranks' partial sums to the messages of their sum, and slices that are sums of several messages."""

import kernel_cases as cases
import pytest

from megatron_comp.wire.formats import Format

DTYPES = [*cases.DTYPES.values()]
CODECS = [*cases.PRESETS, "int4:32:fp16:hadamard", "int2:32:bf16:asym:spike", "int8:8:fp32"]


@pytest.mark.parametrize("codec", CODECS)
def test_sum_of_ranks(codec):
    """The number of ranks, slices, widths and types take turns."""
    turn = CODECS.index(codec)
    rows, hidden = [((2, 1), 64), ((1, 0, 2), 33), ((3,), 999)][turn % 3]
    cases.check_sum_encode(Format.parse(codec), 2 + turn % 2, rows, hidden, DTYPES[turn // 3 % 3], turn)


@pytest.mark.parametrize("ranks", [1, 5, 8])
def test_any_number_of_ranks(ranks):
    cases.check_sum_encode(Format.parse("mxfp4"), ranks, (1, 1), 96, DTYPES[ranks % 3])
