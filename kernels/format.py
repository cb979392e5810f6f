# SPDX-License-Identifier: Apache-2.0
"""What a kernel knows of a codec: numbers, all compile-time constants of one launch."""

from dataclasses import dataclass

from triton.language import constexpr

# Values that a program works on, and its warps: 32 values a thread, read in four 16-byte loads that are all under way
# at once. Not measured on a GPU yet.
TILE = 4096
WARPS = 4

# Values of the longest row that is one tile, if its scale needs all of it: the row is read once.
LONGEST_TILE = 16384

# Every section of a message, and so every message, is padded to this many bytes.
ALIGNMENT = constexpr(16)


def tile_for(block: int, hidden: int, flat: bool, row_scaled: bool = False) -> tuple[int, int, bool]:
    """(values that a program works on at a time, its warps, whether these are a whole row that has a scale).

    block: the larger one of the formats that it decodes and encodes. row_scaled: that it encodes a row with a scale.
    """
    longest = LONGEST_TILE if row_scaled else TILE
    if flat or hidden > longest:
        return TILE, WARPS, False
    # A warp at least, and so many blocks that their narrowest plane fills a byte.
    tile = max(1 << (hidden - 1).bit_length(), TILE // WARPS, 8 * block)
    return tile, tile * WARPS // TILE, row_scaled


@dataclass(frozen=True)
class SmallFloat:
    """A sign-less float: magnitudes up to `max_value`, subnormals, `bias` as IEEE has it."""

    mantissa_bits: int
    bias: int
    max_value: float


@dataclass(frozen=True)
class LevelTable:
    """Magnitudes in units of a power of two, four of them, a byte each, in every word.

    A magnitude's code is how many of `thresholds` it is above.
    """

    words: tuple
    unit: float
    thresholds: tuple


@dataclass(frozen=True)
class Field:
    """Where one field of a message stands.

    first: its first section. planes: a (shift, width) pair per section, `width` bits of each code from bit `shift` up.
    flip: bits that are inverted in the codes as kernels compute them (`numbers.element_codes`).
    """

    first: int
    planes: tuple
    flip: int = 0


@dataclass(frozen=True)
class KernelFormat:
    """One row of data that every kernel here is generic over; `megatron_comp.wire.gpu` fills it from a codec's name.

    Fields that the codec lacks are None. So are small floats and levels of an element or a scale of another kind.
    """

    # Element: a minifloat with a sign on top (`element`), `levels` with a sign on top, or a two's-complement integer.
    element: SmallFloat | None
    levels: LevelTable | None
    bits: int
    mantissa_bits: int  # below the leading one of the largest values; not of levels
    max_value: float
    max_exponent: int

    # Block and scale. kind: "power" (2^(code - bias)), "small" (8-bit float), "fp16", "bf16" or "fp32".
    block: int
    scale_kind: str
    scale_float: SmallFloat | None
    scale_bias: int
    scale_nan_code: int
    scale_underflow_to_zero: bool  # power: a block that needs less than code 0 has decodes to zeros
    largest_scale_code: int  # power: beyond it the element's largest value would be no finite bf16
    smallest_scale: float  # fp16, bf16, fp32: positive scales below it are raised to it,
    largest_scale: float  # and larger ones saturate
    row_scaled: bool
    row_scale_divisor: float  # row scale = largest need of the row / this, but not under
    smallest_row_scale: float

    # Stages that an option switches on.
    rule: str  # power: "floor", "even" or "ceil"
    candidates: tuple  # what `search` tries: exponents to add (power), or factors; one, if there is no search
    asym: bool
    hadamard: bool
    spike: bool
    limit: float  # inputs are clamped to +- this
    sees_subnormals: bool  # the message could tell them from the zeros that they count as

    # Message. sections: what each has codes of ("value", "block", "row" or "spike"), and a code's bits in it.
    sections: tuple
    payload: Field
    scale: Field
    row_scale: Field | None
    zero_point: Field | None
    spike_value: Field | None
    spike_index: Field | None

    # The product of any element and any scale has at most fp32's 24 bits, so that a fused multiply-add rounds as
    # a multiplication and an addition do.
    exact_products: bool

    @property
    def flushes_when_scaled(self) -> bool:
        """Subnormal inputs become zeros when they are multiplied, and no earlier.

        Until then only the scale sees them: the one for nothing but subnormals is the one for zeros.
        """
        plain = not (self.hadamard or self.asym or self.spike) and len(self.candidates) == 1
        return plain and self.max_exponent >= 1 and (self.scale_kind == "power" or self.row_scaled)

    @property
    def rounds_in_fp16(self) -> bool:
        """Inputs of 16 bits are rounded as fp16, two at a time (`numbers.element_code_pairs`).

        Powers of two scale them without an error, and sums of 11 bits above an element's mantissa stay finite.
        """
        powers = self.flushes_when_scaled and self.scale_kind == "power"
        return powers and self.element is not None and 11 - self.mantissa_bits + self.max_exponent <= 16

    @property
    def may_overflow(self) -> bool:
        """Whether scaled values may lie orders of magnitude above the element's largest, as the scale saturates."""
        if self.scale_kind == "power":
            return self.scales_saturate
        return self.scale_kind == "fp16" or (self.scale_kind == "small" and not self.row_scaled)

    @property
    def scales_saturate(self) -> bool:
        """power: whether a finite block may ask for a larger code than `largest_scale_code`."""
        exponent = 127 - self.max_exponent + (self.rule != "floor") + max(self.candidates)
        return exponent + self.scale_bias > self.largest_scale_code

    @property
    def half(self) -> int:
        """2^(bits - 1): the sign's bit in a minifloat's code, the lowest integer's magnitude."""
        return 1 << (self.bits - 1)

    @property
    def mask(self) -> int:
        return (1 << self.bits) - 1

    @property
    def lowest(self) -> float:
        """Of an integer element; with a zero point all codes are in use."""
        return -self.max_value - self.asym

    @property
    def above_max(self) -> int:
        """fp32 mantissas above this one do not fit under the element's largest value in its own binade."""
        return int(self.max_value / 2.0**self.max_exponent * 2**23) & 0x7FFFFF
