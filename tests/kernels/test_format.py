# SPDX-License-Identifier: Apache-2.0
"""`exact_products`: where it is claimed, decode_sum lets the compiler fuse a multiplication with the addition after it.

That gives the bits of the two apart only if no product is ever rounded, so all products there can be are formed.
"""

import itertools

import kernel_cases as cases
import numpy as np
import pytest
import torch

from megatron_comp.wire import gpu, scales
from megatron_comp.wire.formats import BF16_MAX, ELEMENTS, SCALES, Format, TorchFloatScale


def elements(element):
    """All finite values, fp64."""
    values = np.array(ELEMENTS[element].table)
    return values[np.isfinite(values)]


def scale_values(fmt):
    """All that encoding can send, fp64; of fp32 a sample."""
    scale = fmt.scale
    if isinstance(scale, TorchFloatScale):
        dtype, step = {"fp16": (torch.float16, 1), "bf16": (torch.bfloat16, 1), "fp32": (torch.float32, 65537)}[
            scale.name
        ]
        integer = torch.int16 if scale.bits == 16 else torch.int32
        values = torch.arange(0, 1 << (scale.bits - 1), step).to(integer).view(dtype).double().numpy()
        return values[(values >= scale.smallest) & (values <= scales.largest_scale(fmt))]
    largest = scales.largest_code(fmt) if fmt.rule else scale.nan_code - 1
    return np.array(scale.table[: largest + 1])


def exact(fmt):
    products = elements(fmt.element.name)[:, None] * scale_values(fmt)
    # No value decodes beyond the largest bf16. Only the lowest integer could, which zero points bring into use: but
    # they halve what is left of the range for scales.
    products = products[np.abs(products) <= BF16_MAX]
    return bool((products == products.astype(np.float32)).all())


CLAIMS = [name for name, scale in SCALES.items() if gpu.kernel_format(Format.parse(f"int4:32:{name}")).exact_products]


def test_who_claims_it():
    assert CLAIMS == ["e8m0", "e5m0", "e5m3", "fp16", "bf16"]
    for codec in cases.PLAIN + cases.OPTIONS:
        fmt = Format.parse(codec)
        assert gpu.kernel_format(fmt).exact_products == (fmt.scale.name in CLAIMS and not fmt.hadamard)


@pytest.mark.parametrize(
    "element, scale", [pair for pair in itertools.product(ELEMENTS, CLAIMS) if cases.goes_with(*pair)]
)
def test_claims_hold(element, scale):
    """fp32 has all products, those below its normal numbers included."""
    fmt = Format.parse(cases.name(element, 32, scale))
    assert len(scale_values(fmt)) > 2**fmt.scale.bits / 4
    assert exact(fmt)


@pytest.mark.parametrize("element", [name for name in ELEMENTS if name != "int2"])  # whose values are powers of two
def test_others_would_be_wrong_to_claim_it(element):
    """With fp32 scales there are products of more than 24 bits; a row's scale and hadamard's factor are fp32 too."""
    assert not exact(Format.parse(f"{element}:32:fp32"))
