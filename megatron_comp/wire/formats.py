# SPDX-License-Identifier: Apache-2.0
"""Number formats as rows of data: elements, scales, and the codec names made of them.

Everything else in `wire/` is generic over these rows; to add a format is to add a row.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..files import shown

# The largest finite bf16. No block decodes beyond it, so that no finite block becomes infinite in a bf16 model.
BF16_MAX = (2 - 2**-7) * 2.0**127
# The smallest normal fp32 and bf16; smaller inputs count as zero.
SMALLEST_NORMAL = 2.0**-126

Values = tuple[float, ...]

BLOCK_SIZES = (8, 16, 32, 64, 128, 256)


class _Element:
    """What all elements share."""

    max_value: Any

    @property
    def max_exponent(self) -> int:
        """floor(log2(max_value)), `emax` in the OCP MX specification, section 6.3."""
        return math.frexp(self.max_value)[1] - 1


@dataclass(frozen=True)
class Minifloat(_Element):
    """Sign (if `signed`), `exponent_bits`, `mantissa_bits`; subnormals; IEEE-style bias 2^(exponent_bits-1) - 1.

    `specials` is how many of the topmost codes of each sign are no numbers: one NaN, or an infinity and then NaNs.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    specials: int = 0
    signed: bool = True

    @property
    def bits(self) -> int:
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def max_code(self) -> int:
        """The magnitude code of the largest finite value."""
        return 2 ** (self.exponent_bits + self.mantissa_bits) - 1 - self.specials

    @cached_property
    def max_value(self) -> float:
        return self.magnitude(self.max_code)

    def magnitude(self, code: int) -> float:
        if code > self.max_code:
            return math.inf if self.specials > 1 and code == self.max_code + 1 else math.nan
        exponent, mantissa = divmod(code, 2**self.mantissa_bits)
        if exponent == 0:
            return math.ldexp(mantissa, 1 - self.bias - self.mantissa_bits)
        return math.ldexp(2**self.mantissa_bits + mantissa, exponent - self.bias - self.mantissa_bits)

    @cached_property
    def table(self) -> Values:
        """The value of each of the 2^bits codes."""
        half = [self.magnitude(code) for code in range(2 ** (self.exponent_bits + self.mantissa_bits))]
        return tuple(half + [-value for value in half]) if self.signed else tuple(half)


@dataclass(frozen=True)
class Integer(_Element):
    """Two's complement. Without a zero point only -max_value .. max_value are sent; with one, all 2^bits codes."""

    name: str
    bits: int

    @property
    def max_value(self) -> float:
        return 2.0 ** (self.bits - 1) - 1

    @property
    def mantissa_bits(self) -> int:
        """Bits below the leading one of the largest values: what `even` rounds a block maximum to."""
        return self.bits - 2

    @cached_property
    def table(self) -> Values:
        half = 2 ** (self.bits - 1)
        return tuple(float(code - 2 * half if code >= half else code) for code in range(2 * half))


@dataclass(frozen=True)
class Levels(_Element):
    """A sign and one of 2^(bits-1) magnitudes, none of them zero, each of them chosen by itself.

    magnitudes: ascending multiples of `unit`, of 127 at most.
    """

    name: str
    magnitudes: tuple[int, ...]
    unit: float

    @property
    def bits(self) -> int:
        return len(self.magnitudes).bit_length()

    @property
    def max_value(self) -> float:
        return self.magnitudes[-1] * self.unit

    @cached_property
    def thresholds(self) -> Values:
        """The magnitude of an fp32 takes the code of how many of these it is above: nearest, ties to the even code."""
        middles = [(low + high) / 2 * self.unit for low, high in itertools.pairwise(self.magnitudes)]
        return tuple(_fp32_below(middle) if code % 2 else middle for code, middle in enumerate(middles))

    @cached_property
    def table(self) -> Values:
        half = [magnitude * self.unit for magnitude in self.magnitudes]
        return tuple(half + [-value for value in half])


def _fp32_below(value: float) -> float:
    """The fp32 before `value`, which is one, positive and no power of two."""
    return value - math.ldexp(1.0, math.frexp(value)[1] - 24)


Element = Minifloat | Integer | Levels


@dataclass(frozen=True)
class PowerOfTwo:
    """2^(code - bias) for codes 0 .. 2^bits - 2; the last code is NaN.

    `underflow_to_zero`: a block that needs a smaller scale than code 0 has decodes to zeros; otherwise it takes code 0.
    """

    name: str
    bits: int
    bias: int
    underflow_to_zero: bool = False
    row_scaled: bool = False

    @property
    def nan_code(self) -> int:
        return 2**self.bits - 1

    @cached_property
    def table(self) -> Values:
        return tuple(math.ldexp(1.0, code - self.bias) for code in range(self.nan_code)) + (math.nan,)


@dataclass(frozen=True)
class SmallFloatScale:
    """An 8-bit float of positive values. `row_scaled`: times one fp32 a row, as NVFP4 has one a tensor."""

    name: str
    float: Minifloat
    row_scaled: bool = False

    bits = 8

    @property
    def nan_code(self) -> int:
        return self.float.max_code + 1

    @cached_property
    def table(self) -> Values:
        """The value of each of the 256 codes; scales have no sign, so all above the largest value are NaN."""
        return tuple(self.float.magnitude(code) for code in range(256))


@dataclass(frozen=True)
class TorchFloatScale:
    """A float that torch has; travels as its bit pattern. `smallest`: positive scales below it are raised to it.

    fp32 and bf16 scales stop at the smallest normal so that their reciprocals are finite; fp16 keeps its subnormals.
    """

    name: str
    bits: int
    nan_code: int
    max_value: float
    smallest: float = 0.0
    row_scaled: bool = False


Scale = PowerOfTwo | SmallFloatScale | TorchFloatScale

_ELEMENTS: tuple[Element, ...] = (
    Minifloat("fp3_e1m1", 1, 1),
    Minifloat("fp4_e2m1", 2, 1),
    Minifloat("fp5_e2m2", 2, 2),
    Minifloat("fp5_e3m1", 3, 1),
    Minifloat("fp6_e2m3", 2, 3),
    Minifloat("fp6_e3m2", 3, 2),
    Minifloat("fp8_e4m3", 4, 3, specials=1),
    Minifloat("fp8_e5m2", 5, 2, specials=4),
    *(Integer(f"int{bits}", bits) for bits in range(2, 9)),
    # Of least squared error (S. Lloyd, IEEE Trans. Inf. Theory 28, 1982) for normal values in blocks of 32 to 128,
    # whose scale is searched: `research/levels.py`, whose means for 5 bits are up to two units higher and have 0.6 to
    # 2 % more squared error in blocks of 16 to 256. arXiv 2505.06653 has such levels for weights.
    Levels("lloyd2", (19, 64), 1 / 8),
    Levels("lloyd3", (7, 21, 39, 64), 1 / 8),
    Levels("lloyd4", (3, 9, 15, 22, 29, 38, 48, 64), 1 / 8),
    Levels("lloyd5", (3, 8, 14, 19, 25, 31, 36, 42, 48, 54, 60, 68, 75, 85, 96, 112), 1 / 16),
)
ELEMENTS = {element.name: element for element in _ELEMENTS}

SCALES: dict[str, Scale] = {
    scale.name: scale
    for scale in (
        PowerOfTwo("e8m0", 8, 127),  # OCP MX
        PowerOfTwo("e5m0", 5, 20, underflow_to_zero=True),  # arXiv 2411.09510: effective bits of its tables
        SmallFloatScale("e5m3", Minifloat("e5m3", 5, 3, specials=1, signed=False)),
        SmallFloatScale("e4m3", Minifloat("e4m3", 4, 3, specials=1), row_scaled=True),
        TorchFloatScale("fp16", 16, 0x7E00, 65504.0),
        TorchFloatScale("bf16", 16, 0x7FC0, BF16_MAX, smallest=SMALLEST_NORMAL),
        TorchFloatScale("fp32", 32, 0x7FC00000, (2 - 2**-23) * 2.0**127, smallest=SMALLEST_NORMAL),
    )
}

ROUNDING_RULES = ("floor", "even", "ceil")
FLAGS = ("asym", "hadamard", "search", "spike")

PRESETS: dict[str, str] = {
    "mxfp4": "fp4_e2m1:32:e8m0",
    "mxfp6": "fp6_e2m3:32:e8m0",
    "mxfp8": "fp8_e4m3:32:e8m0",
    "nvfp4": "fp4_e2m1:16:e4m3",
    "paper-llama3-8b": "fp4_e2m1:8:e5m0",  # arXiv 2411.09510, chosen for Llama-3.1-8B
    "paper-llama3-70b": "fp5_e2m2:32:e5m0",  # the same, for Llama-3.1-70B
    "quickreduce-int4": "int4:32:fp16",
    "flash-int4": "int4:128:fp16:asym",  # arXiv 2412.04964
}


@dataclass(frozen=True)
class Format:
    """One codec name, parsed: `element:block:scale[:option...]`.

    rule: how a power-of-two scale is taken from the block maximum; empty for other scales.
    """

    element: Element
    block: int
    scale: Scale
    rule: str = ""
    asym: bool = False
    hadamard: bool = False
    search: bool = False
    spike: bool = False

    def __post_init__(self) -> None:
        power_of_two = isinstance(self.scale, PowerOfTwo)
        if power_of_two and not self.rule:
            object.__setattr__(self, "rule", "floor")
        if self.rule and not power_of_two:
            powers = [name for name, scale in SCALES.items() if isinstance(scale, PowerOfTwo)]
            raise ValueError(
                f"option {self.rule!r} clashes with scale {self.scale.name!r}: it goes with {' and '.join(powers)}"
            )
        if isinstance(self.element, Levels) and power_of_two:
            zeros = [name for name, scale in SCALES.items() if not isinstance(scale, PowerOfTwo)]
            raise ValueError(
                f"element {self.element.name!r} clashes with scale {self.scale.name!r}: neither has a zero for blocks "
                f"of zeros; it goes with {', '.join(zeros)}"
            )
        for option in ("asym", "spike"):
            if getattr(self, option) and not isinstance(self.element, Integer):
                raise ValueError(
                    f"option {option!r} clashes with element {self.element.name!r}: it goes with int2..int8"
                )

    @classmethod
    def parse(cls, text: str) -> "Format":
        """Raises ValueError that names the part that is wrong and what it may be."""
        parts = PRESETS.get(text, text).split(":")
        if len(parts) < 3:
            raise ValueError(
                f"codec {shown(text)} is neither a preset ({', '.join(PRESETS)}) nor of the form "
                "element:block:scale[:option...], as in 'int4:32:fp16:hadamard'"
            )
        element, block, scale, *options = parts
        if element not in ELEMENTS:
            raise ValueError(f"codec {shown(text)}: unknown element {shown(element)}; known are {', '.join(ELEMENTS)}")
        if block not in map(str, BLOCK_SIZES):
            raise ValueError(
                f"codec {shown(text)}: unknown block size {shown(block)}; known are {', '.join(map(str, BLOCK_SIZES))}"
            )
        if scale not in SCALES:
            raise ValueError(f"codec {shown(text)}: unknown scale {shown(scale)}; known are {', '.join(SCALES)}")
        known = ROUNDING_RULES + FLAGS
        if unknown := [o for o in options if o not in known]:
            raise ValueError(f"codec {shown(text)}: unknown option {shown(unknown[0])}; known are {', '.join(known)}")
        if repeated := [o for o in options if options.count(o) > 1]:
            raise ValueError(f"codec {shown(text)}: option {repeated[0]!r} is given more than once")
        rules = [o for o in options if o in ROUNDING_RULES]
        if len(rules) > 1:
            raise ValueError(f"codec {shown(text)}: options {rules[0]!r} and {rules[1]!r} clash: give one of them")
        try:
            flags = {flag: flag in options for flag in FLAGS}
            return cls(ELEMENTS[element], int(block), SCALES[scale], rules[0] if rules else "", **flags)
        except ValueError as error:
            raise ValueError(f"codec {shown(text)}: {error}") from None

    def __str__(self) -> str:
        options = [self.rule] if self.rule not in ("", "floor") else []
        options += [flag for flag in FLAGS if getattr(self, flag)]
        return ":".join([self.element.name, str(self.block), self.scale.name, *options])
