# SPDX-License-Identifier: Apache-2.0
"""What `wire/` must do, written a second time from the contracts: numpy and Python floats, nothing of `wire/` itself.

Codec names are taken apart here too; a message is read bit by bit with `numpy.unpackbits`.
"""

import itertools
import math

import ml_dtypes
import numpy as np
import torch
from hypothesis import settings

# The same examples in every run.
FIXED = settings(derandomize=True, database=None, deadline=None, max_examples=60)

BF16_MAX = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
SMALLEST_NORMAL = 2.0**-126

# name: (exponent bits, mantissa bits, largest finite value)
MINIFLOATS = {
    "fp3_e1m1": (1, 1, 3.0),
    "fp4_e2m1": (2, 1, 6.0),
    "fp5_e2m2": (2, 2, 7.0),
    "fp5_e3m1": (3, 1, 24.0),
    "fp6_e2m3": (2, 3, 7.5),
    "fp6_e3m2": (3, 2, 28.0),
    "fp8_e4m3": (4, 3, 448.0),
    "fp8_e5m2": (5, 2, 57344.0),
}
INTEGERS = {f"int{bits}": bits for bits in range(2, 9)}
LEVELS = {  # name: magnitudes
    "lloyd2": [2.375, 8],
    "lloyd3": [0.875, 2.625, 4.875, 8],
    "lloyd4": [0.375, 1.125, 1.875, 2.75, 3.625, 4.75, 6, 8],
    "lloyd5": [n / 16 for n in (3, 8, 14, 19, 25, 31, 36, 42, 48, 54, 60, 68, 75, 85, 96, 112)],
}
ELEMENTS = [*MINIFLOATS, *INTEGERS, *LEVELS]
WITH_ZERO = [*MINIFLOATS, *INTEGERS]
BLOCKS = [8, 16, 32, 64, 128, 256]
POWERS_OF_TWO = {"e8m0": (8, 127), "e5m0": (5, 20)}  # bits, bias
SCALE_BITS = {"e8m0": 8, "e5m0": 5, "e5m3": 8, "e4m3": 8, "fp16": 16, "bf16": 16, "fp32": 32}
SCALES = [*SCALE_BITS]
# A block of zeros needs a zero in its element or in its scale.
ELEMENTS_WITH_SCALES = [
    (element, scale)
    for element, scale in itertools.product(ELEMENTS, SCALES)
    if element in WITH_ZERO or scale not in POWERS_OF_TWO
]
NAN_SCALES = {"e8m0": 255, "e5m0": 31, "e5m3": 255, "e4m3": 0x7F, "fp16": 0x7E00, "bf16": 0x7FC0, "fp32": 0x7FC00000}
PRESETS = {  # name: (what it stands for, bits per value)
    "mxfp4": ("fp4_e2m1:32:e8m0", 4.25),
    "mxfp6": ("fp6_e2m3:32:e8m0", 6.25),
    "mxfp8": ("fp8_e4m3:32:e8m0", 8.25),
    "nvfp4": ("fp4_e2m1:16:e4m3", 4.5),
    "paper-llama3-8b": ("fp4_e2m1:8:e5m0", 4.625),
    "paper-llama3-70b": ("fp5_e2m2:32:e5m0", 5.15625),
    "quickreduce-int4": ("int4:32:fp16", 4.5),
    "flash-int4": ("int4:128:fp16:asym", 4.25),
}


def with_scales(*scales: str) -> list[tuple[str, str]]:
    return [(element, scale) for element, scale in ELEMENTS_WITH_SCALES if scale in scales]


def rules(scale: str) -> list[str]:
    return ["", "even", "ceil"] if scale in POWERS_OF_TWO else [""]


def flag_sets(element: str) -> list[tuple[str, ...]]:
    """Every set of flags that goes with the element."""
    flags = ["asym", "hadamard", "search", "spike"] if element in INTEGERS else ["hadamard", "search"]
    return [chosen for count in range(len(flags) + 1) for chosen in itertools.combinations(flags, count)]


def some_options(element: str, scale: str, shares: int) -> list[tuple[str, ...]]:
    """One of so many shares of all rules with all sets of flags.

    Shares go around with elements and scales, so that every element and every scale meets every set of flags, and
    every scale every rule with each of them.
    """
    every = [(rule, *flags) for rule in rules(scale) for flags in flag_sets(element)]
    share = ELEMENTS.index(element) + SCALES.index(scale)
    return [options for number, options in enumerate(every) if (number + share) % shares == 0]


def some_blocks(element: str, scale: str) -> list[int]:
    """Every second size of blocks; with the next element or scale, the others."""
    return BLOCKS[(ELEMENTS.index(element) + SCALES.index(scale)) % 2 :: 2]


def name(element, block, scale, *options) -> str:
    return ":".join([element, str(block), scale, *filter(None, options)])


def all_codecs() -> list[str]:
    """Every codec there is, by its shortest name."""
    return [
        name(element, block, scale, rule, *flags)
        for (element, scale), block in itertools.product(ELEMENTS_WITH_SCALES, BLOCKS)
        for rule in rules(scale)
        for flags in flag_sets(element)
    ]


POWER_OF_TWO_CODECS = [
    name(element, block, scale, rule)
    for element, block, scale in itertools.product(WITH_ZERO, BLOCKS, POWERS_OF_TWO)
    for rule in rules(scale)
]


# Elements.


def element_bits(element: str) -> int:
    if element in LEVELS:
        return int(math.log2(2 * len(LEVELS[element])))
    return INTEGERS[element] if element in INTEGERS else 1 + sum(MINIFLOATS[element][:2])


def largest(element: str) -> float:
    if element in LEVELS:
        return LEVELS[element][-1]
    return MINIFLOATS[element][2] if element in MINIFLOATS else 2.0 ** (INTEGERS[element] - 1) - 1


def mantissa_bits(element: str) -> int:
    """Below the leading one, in the largest values of the element."""
    return MINIFLOATS[element][1] if element in MINIFLOATS else INTEGERS[element] - 2


def largest_gap(element: str) -> float:
    """Between the element's two largest values."""
    if element in LEVELS:
        return LEVELS[element][-1] - LEVELS[element][-2]
    return 2.0 ** (math.floor(math.log2(largest(element))) - mantissa_bits(element))


def minifloat_value(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """(-1)^sign 2^(exponent - bias) 1.mantissa, or 2^(1 - bias) 0.mantissa where the exponent's field is zero."""
    mantissa = code % 2**mantissa_bits / 2**mantissa_bits
    exponent = code // 2**mantissa_bits % 2**exponent_bits
    sign = -1.0 if code // 2 ** (mantissa_bits + exponent_bits) else 1.0
    bias = 2 ** (exponent_bits - 1) - 1
    return sign * 2.0 ** (max(exponent, 1) - bias) * ((exponent > 0) + mantissa)


def element_value(element: str, code: int) -> float:
    """Of one code; NaN or infinity for the few codes of the 8-bit floats that are not numbers."""
    if element in INTEGERS:
        return float(code - 2 ** INTEGERS[element] * (code >= 2 ** (INTEGERS[element] - 1)))
    if element in LEVELS:
        sign, magnitude = divmod(code, len(LEVELS[element]))
        return LEVELS[element][magnitude] * (-1) ** sign
    if element == "fp8_e4m3" and code % 128 == 127 or element == "fp8_e5m2" and code % 128 > 124:
        return math.nan
    if element == "fp8_e5m2" and code % 128 == 124:
        return math.copysign(math.inf, 128 - code)
    return minifloat_value(code, *MINIFLOATS[element][:2])


def element_table(element: str) -> np.ndarray:
    return np.array([element_value(element, code) for code in range(2 ** element_bits(element))])


def nearest_even(magnitudes: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Index of the nearest of ascending `magnitudes`, the even index of two that are as near; saturates. Exact."""
    x = np.minimum(x.astype(np.float64), magnitudes[-1])
    below = np.maximum(np.searchsorted(magnitudes, x, side="right") - 1, 0)
    above = np.minimum(below + 1, len(magnitudes) - 1)
    low, high = x - magnitudes[below], magnitudes[above] - x
    return np.where((high < low) | ((high == low) & (below % 2 == 1)), above, below)


def element_codes(element: str, y: np.ndarray) -> np.ndarray:
    """Of scaled values, without a zero point."""
    bits = element_bits(element)
    half = 2 ** (bits - 1)
    magnitudes = np.arange(half, dtype=np.float64)
    if element not in INTEGERS:
        table = element_table(element)[:half]
        magnitudes = table[np.isfinite(table)]
    index = nearest_even(magnitudes, np.abs(y))
    if element not in INTEGERS:
        return index + half * np.signbit(y)
    return np.where(np.signbit(y), -index, index) % (2 * half)


# Scales.


def scale_table(scale: str) -> np.ndarray:
    """Values of all codes of a scale of at most 8 bits."""
    if scale in POWERS_OF_TWO:
        bits, bias = POWERS_OF_TWO[scale]
        return np.array([2.0 ** (code - bias) for code in range(2**bits - 1)] + [math.nan])
    if scale == "e4m3":  # without a sign: 448 is the last number
        return np.append(element_table("fp8_e4m3")[:127], [math.nan] * 129)
    return np.array([minifloat_value(code, 5, 3) for code in range(255)] + [math.nan])


def scale_values(codes: np.ndarray, scale: str) -> np.ndarray:
    """fp32 values, without row scales."""
    if SCALE_BITS[scale] <= 8:
        return scale_table(scale).astype(np.float32)[codes]
    integer, floating = {
        "fp16": (np.uint16, np.float16),
        "bf16": (np.uint16, ml_dtypes.bfloat16),
        "fp32": (np.uint32, np.float32),
    }[scale]
    return codes.astype(integer).view(floating).astype(np.float32)


def power_of_two_exponent(amax: float, element: str, rule: str) -> int:
    """k of the scale 2^k that a rule takes for a block maximum > 0, in exact arithmetic."""
    emax = math.frexp(largest(element))[1] - 1
    fraction, exponent = math.frexp(amax)
    k = exponent - 1 - emax
    if rule == "even":
        bits = 1 + mantissa_bits(element)
        return k + (round(fraction * 2**bits) == 2**bits)
    if rule == "ceil":
        return k + (amax > math.ldexp(largest(element), k))
    return k


def scale_codes(need: np.ndarray, codec: str, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(codes, fp32 reciprocals) of fp32 `need` `[rows, blocks]`, all finite."""
    element, _, scale, *options = codec.split(":")
    top = np.float32(largest(element))
    if scale in POWERS_OF_TWO:
        rule = next((o for o in options if o in ("even", "ceil")), "")
        table = scale_table(scale)
        highest = max(code for code in range(len(table) - 1) if table[code] * largest(element) <= BF16_MAX)
        k = [power_of_two_exponent(float(v), element, rule) if v else -1000 for v in need.ravel()]
        wanted = np.array(k, dtype=np.int64).reshape(need.shape) + POWERS_OF_TWO[scale][1]
        codes = np.clip(wanted, 0, highest)
        reciprocals = 1 / scale_values(codes, scale)
        return codes, np.where(wanted < 0, np.float32(0), reciprocals) if scale == "e5m0" else reciprocals
    wanted = need / top
    if rows is not None:
        wanted = wanted / rows
    if scale in ("e4m3", "e5m3"):
        magnitudes = scale_table(scale)[: NAN_SCALES[scale]]
        codes = nearest_even(magnitudes, wanted)
    else:
        codes = np.where(wanted > 0, _torch_float_codes(wanted, scale, top), 0)
    values = scale_values(codes, scale) * (1 if rows is None else rows)
    with np.errstate(divide="ignore"):
        return codes, np.where(values == 0, np.float32(0), np.float32(1) / values)


def _torch_float_codes(wanted, scale, top):
    if scale == "fp16":
        return np.minimum(wanted, np.float32(65504)).astype(np.float16).view(np.uint16)
    wanted = np.maximum(wanted, np.float32(SMALLEST_NORMAL))
    if scale == "fp32":
        highest = np.float32(BF16_MAX / top)
        highest = highest if float(highest) * float(top) <= BF16_MAX else np.nextafter(highest, np.float32(0))
        return np.minimum(wanted, highest).view(np.uint32)
    codes = wanted.astype(ml_dtypes.bfloat16).view(np.uint16)
    every = np.arange(0x7F80, dtype=np.uint16)
    fits = every.view(ml_dtypes.bfloat16).astype(np.float64) * float(top) <= BF16_MAX
    return np.minimum(codes, every[fits][-1])


# Whole tensors.


def encode(x: np.ndarray, codec: str) -> dict[str, np.ndarray]:
    """The fields of the message of fp32 `[rows, hidden]` for a codec without flags."""
    element, block, scale, *_ = codec.split(":")
    block, (rows, hidden) = int(block), x.shape
    x = np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)
    padded = np.zeros((rows, -(-hidden // block) * block), dtype=np.float32)
    padded[:, :hidden] = np.where(np.isfinite(x), np.clip(x, -BF16_MAX, BF16_MAX), np.nan)
    blocks = padded.reshape(rows, -1, block)
    need = np.abs(blocks).max(axis=-1)
    bad = np.isnan(need)
    need = np.where(bad, np.float32(0), need)
    fields, row_scales = {}, None
    if scale == "e4m3":
        row_scales = need.max(axis=1, keepdims=True) / np.float32(448 * largest(element))
        row_scales = np.maximum(row_scales, np.float32(2.0**-117))
        fields["row_scale"] = row_scales.view(np.uint32)
    codes, reciprocals = scale_codes(need, codec, row_scales)
    fields["scale"] = np.where(bad, NAN_SCALES[scale], codes)
    scaled = np.where(bad[..., None], np.float32(0), blocks * reciprocals[..., None])
    fields["payload"] = element_codes(element, scaled).reshape(rows, -1)[:, :hidden]
    return fields


def scales_and_zeros(fields: dict[str, np.ndarray], codec: str) -> tuple[np.ndarray, np.ndarray]:
    """fp32 `[rows, hidden]`: what a value's element is multiplied by, and what is added then."""
    _, block, scale, *options = codec.split(":")
    hidden = fields["payload"].shape[1]
    scales = scale_values(fields["scale"], scale)
    if scale == "e4m3":
        scales = scales * fields["row_scale"].astype(np.uint32).view(np.float32)
    zeros = scale_values(fields["zero_point"], "bf16") if "asym" in options else np.full_like(scales, -0.0)
    return tuple(np.repeat(each, int(block), axis=1)[:, :hidden] for each in (scales, zeros))


def spike_places(fields: dict[str, np.ndarray], codec: str) -> np.ndarray:
    """Columns of the spikes, `[rows, 2 * blocks]`."""
    blocks = np.arange(fields["scale"].shape[1]) * int(codec.split(":")[1])
    return fields["spike_index"] + np.repeat(blocks, 2)


def decode(fields: dict[str, np.ndarray], codec: str) -> np.ndarray:
    """fp32 `[rows, hidden]` of the fields; with `hadamard`, transformed."""
    scales, zeros = scales_and_zeros(fields, codec)
    y = element_table(codec.split(":")[0]).astype(np.float32)[fields["payload"]] * scales + zeros
    if "spike_value" in fields:
        np.put_along_axis(y, spike_places(fields, codec), scale_values(fields["spike_value"], "bf16"), axis=1)
    return y


def hadamard(x: np.ndarray, block: int) -> np.ndarray:
    """The orthonormal transform of every whole block of fp32 `[rows, hidden]`, its own inverse.

    Step by step each value becomes its partner's plus or minus itself, with partners 1, 2, 4, ... places away.
    """
    whole = x.shape[1] // block * block
    y = x[:, :whole].reshape(len(x), -1, block)
    places = np.arange(block)
    for distance in (2**step for step in range(block.bit_length() - 1)):
        y = y[..., places ^ distance] + np.where(places & distance, np.float32(-1), np.float32(1)) * y
    return np.concatenate([(y * np.float32(block**-0.5)).reshape(len(x), whole), x[:, whole:]], axis=1)


def decoded_sum(messages: torch.Tensor, codec: str, rows: int, hidden: int, transformed: bool = False) -> np.ndarray:
    """fp32 `[rows, hidden]`: the values of all messages in their order, with `hadamard` transformed back once.

    transformed: not transformed back.
    """
    total = np.full((rows, hidden), np.float32(-0.0))
    for message in messages:
        total = total + decode(read(message, codec, rows, hidden), codec)
    _, block, _, *options = codec.split(":")
    return hadamard(total, int(block)) if "hadamard" in options and not transformed else total


# Messages.


def planes(codec: str, rows: int, hidden: int):
    """(field, shift, width, columns, row bytes, offset) of every section, and the message's bytes last."""
    element, block, scale, *options = codec.split(":")
    blocks = math.ceil(hidden / int(block))
    widths = {"payload": (hidden, element_bits(element)), "scale": (blocks, SCALE_BITS[scale])}
    if scale == "e4m3":
        widths["row_scale"] = (1, 32)
    if "asym" in options:
        widths["zero_point"] = (blocks, 16)
    if "spike" in options:
        widths["spike_value"] = (2 * blocks, 16)
        widths["spike_index"] = (2 * blocks, int(math.log2(int(block))))
    sections, offset = [], 0
    for field, (columns, bits) in widths.items():
        shift = 0
        for width in (32, 16, 8, 4, 2, 1):
            if bits & width:
                row_bytes = math.ceil(columns * width / 8)
                sections.append((field, shift, width, columns, row_bytes, offset))
                offset += math.ceil(rows * row_bytes / 16) * 16
                shift += width
    return sections, offset


def message_bytes(codec: str, shape) -> int:
    return planes(codec, math.prod(shape[:-1]), shape[-1])[1]


def read(message: torch.Tensor, codec: str, rows: int, hidden: int) -> dict[str, np.ndarray]:
    """All fields of a message as integers `[rows, columns]`; every bit that carries nothing must be zero."""
    sections, nbytes = planes(codec, rows, hidden)
    data, fields = message.numpy(), {}
    assert data.shape == (nbytes,)
    ends = [section[-1] for section in sections[1:]] + [nbytes]
    for (field, shift, width, columns, row_bytes, offset), end in zip(sections, ends, strict=True):
        used = data[offset : offset + rows * row_bytes].reshape(rows, row_bytes)
        bits = np.unpackbits(used, axis=1, bitorder="little")
        assert not bits[:, columns * width :].any() and not data[offset + rows * row_bytes : end].any()
        codes = bits[:, : columns * width].reshape(rows, columns, width) @ (1 << np.arange(width, dtype=np.int64))
        fields[field] = fields.get(field, 0) | codes << shift
    return fields


def write(fields: dict[str, np.ndarray], codec: str, rows: int, hidden: int) -> torch.Tensor:
    """The message of these fields."""
    sections, nbytes = planes(codec, rows, hidden)
    data = np.zeros(nbytes, dtype=np.uint8)
    for field, shift, width, _, row_bytes, offset in sections:
        codes = fields[field].astype(np.int64)[..., None] >> shift >> np.arange(width) & 1
        packed = np.packbits(codes.reshape(rows, -1).astype(np.uint8), axis=1, bitorder="little")
        data[offset : offset + rows * row_bytes] = packed.ravel()
    return torch.from_numpy(data)


# Data.


def random_tensor(shape, dtype=torch.float32, seed=0, spread=3.0) -> torch.Tensor:
    """Normal values; each run of eight along the last dimension has a magnitude of its own, 2^-spread .. 2^spread."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    exponents = (torch.rand(*shape[:-1], -(-shape[-1] // 8), generator=generator) * 2 - 1) * spread
    return (x * exponents.exp2().repeat_interleave(8, dim=-1)[..., : shape[-1]]).to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, but that any NaN equals any other."""
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    nan = a.isnan() & b.isnan()
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a.view(integer) == b.view(integer)) | nan).all())
