# SPDX-License-Identifier: Apache-2.0
"""Instructions that each thread does by itself: registers in, one register out.

`result(instruction, read)` gives the bits of the first operand. read(i, bits) gives operand i as unsigned integers of
that width, one value per thread; read(i, 1) gives a predicate. Instructions that move data between threads, or to and
from memory, are in block.py. All others are Unknown, those that flush subnormals or approximate among them.
"""

import floats
import numpy as np
from floats import F16, F32
from memory import Unknown
from program import Instruction

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: F16, 32: F32}
U16, U32, U64, I64 = np.uint16, np.uint32, np.uint64, np.int64

# What may stand between an operation's name and its type, and changes nothing here: rounding to nearest even is how
# numpy rounds, and ptxas may not do otherwise where the text leaves it out.
PLAIN_WORDS = {"rn", "lo", "wide", "hi", "NaN"}


def result(instruction: Instruction, read) -> np.ndarray:
    operation = instruction.words[0]
    if instruction.words in APPROXIMATE:
        return APPROXIMATE[instruction.words](instruction, read)
    if operation in SPECIAL:
        return SPECIAL[operation](instruction, read)
    if instruction.kind == "pred":
        return LOGIC[operation](*(read(i, 1) for i in range(1, len(instruction.operands))))
    packed, a_float = instruction.words[-1].endswith("x2"), instruction.kind == "f"
    table = PACKED if packed else FLOATS if a_float else INTEGERS
    if operation not in table or not PLAIN_WORDS.issuperset(instruction.words[1:-1]):
        raise Unknown(f"instruction {'.'.join(instruction.words)}")
    if packed:
        return _packed(instruction, read)
    if a_float:
        return _float(instruction, table[operation], read)
    return _integer(instruction, table[operation], read)


def _integer(instruction, operation, read):
    """Types say whether numpy divides, compares and extends with a sign."""
    bits, types = instruction.bits, SIGNED if instruction.kind == "s" else UNSIGNED
    values = [read(i, bits).view(types[bits]) for i in range(1, len(instruction.operands))]
    if instruction.words[1] not in ("wide", "hi"):
        return operation(*values).view(UNSIGNED[bits])
    wide = types[2 * bits]
    product = values[0].astype(wide) * values[1].astype(wide)
    if instruction.words[1] == "hi":
        return (product >> wide(bits)).astype(types[bits]).view(UNSIGNED[bits])
    if instruction.words[0] == "mad":  # what is added is wide itself
        product = product + read(3, 2 * bits).view(wide)
    return product.view(UNSIGNED[2 * bits])


def _float(instruction, operation, read):
    bits = instruction.bits
    values = [read(i, bits) for i in range(1, len(instruction.operands))]
    result = operation(FLOAT[bits], *values)
    if "NaN" in instruction.words:  # min and max that NaN wins
        no_number = np.logical_or.reduce([np.isnan(value.view(FLOAT[bits])) for value in values])
        result = np.where(no_number, floats.NAN[FLOAT[bits]], result)
    return result


def _quotient(x, y):
    """Towards zero; by zero it is some number."""
    sign = np.sign(x.astype(I64)) * np.sign(y.astype(I64))
    quotient = sign * (np.abs(x.astype(I64)) // np.maximum(np.abs(y.astype(I64)), 1))
    return np.where(y == 0, -1, quotient).astype(x.dtype)


INTEGERS = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "mad": lambda x, y, z: x * y + z,
    "div": _quotient,
    "rem": lambda x, y: x - _quotient(x, y) * y,
    "min": np.minimum,
    "max": np.maximum,
    "abs": np.abs,
    "neg": lambda x: np.zeros_like(x) - x,
    "not": lambda x: ~x,
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "xor": lambda x, y: x ^ y,
    "popc": lambda x: np.unpackbits(x.view(np.uint8)).reshape(*x.shape, -1).sum(-1, dtype=x.dtype),
}
LOGIC = {name: INTEGERS[name] for name in ("and", "or", "xor", "not")} | {"mov": lambda x: x.copy()}

FLOATS = {
    "add": lambda dtype, x, y: floats.bits_of(x.view(dtype) + y.view(dtype)),
    "sub": lambda dtype, x, y: floats.bits_of(x.view(dtype) - y.view(dtype)),
    "mul": lambda dtype, x, y: floats.bits_of(x.view(dtype) * y.view(dtype)),
    "div": lambda dtype, x, y: floats.bits_of(x.view(dtype) / y.view(dtype)),
    "fma": floats.fma,
    "min": lambda dtype, x, y: floats.least(x, y, dtype),
    "max": lambda dtype, x, y: floats.greatest(x, y, dtype),
    "abs": lambda dtype, x: x & ~_sign(x),
    "neg": lambda dtype, x: x ^ _sign(x),
    "copysign": lambda dtype, x, y: (x & _sign(x)) | (y & ~_sign(y)),
}


def _sign(x):
    return x.dtype.type(1 << (8 * x.itemsize - 1))


def _packed(instruction, read):
    """Two 16-bit floats in a register; bf16 is compared as the fp32 that it is the upper half of."""
    operation = PACKED[instruction.words[0]]
    halves = [floats.halves(read(i, 32)) for i in range(1, len(instruction.operands))]
    results = []
    for values in zip(*halves):
        if instruction.words[-1] == "bf16x2":
            if operation is floats.fma:
                raise Unknown("a sum of bf16")
            wide = [x.astype(U32) << U32(16) for x in values]
            result = operation(F32, *wide) >> U32(16)
            nan = np.logical_or.reduce([np.isnan(x.view(F32)) for x in wide])
        else:
            result = operation(F16, *values)
            nan = np.logical_or.reduce([np.isnan(x.view(F16)) for x in values])
        results.append(np.where(nan, U16(0x7FFF), result) if "NaN" in instruction.words else result)
    return floats.pair(*results)


PACKED = {name: FLOATS[name] for name in ("min", "max", "fma")}


def _compare(instruction, read):
    """setp. Of floats, eq, lt, ... are false with a NaN; equ, ltu, ... are true."""
    how, bits = instruction.words[1], instruction.bits
    if instruction.kind == "f":
        x, y = (read(i, bits).view(FLOAT[bits]) for i in (1, 2))
        return compare_floats(how, x, y)
    own = (SIGNED if instruction.kind == "s" else UNSIGNED)[bits]
    x, y = (read(i, bits).view(own) for i in (1, 2))
    return COMPARE[{"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(how, how)](x, y)


def compare_floats(how: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    nan = np.isnan(x) | np.isnan(y)
    if how in ("num", "nan"):
        return nan == (how == "nan")
    return COMPARE[how[:2]](x, y) & ~nan | (nan if len(how) == 3 else False)


COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _move(instruction, read):
    """mov, also of two registers into one that is twice as wide."""
    if instruction.kind == "pred":
        return read(1, 1).copy()
    if instruction.operands[1].startswith("{"):
        half = instruction.bits // 2
        low, high = read(1, half, 0), read(1, half, 1)
        wide = UNSIGNED[instruction.bits]
        return low.astype(wide) | (high.astype(wide) << wide(half))
    return read(1, instruction.bits).copy()


def _select(instruction, read):
    bits = instruction.bits
    return np.where(read(3, 1), read(1, bits), read(2, bits))


def _shift(instruction, read):
    """A distance of the register's width or more shifts everything out."""
    bits = instruction.bits
    own = (SIGNED if instruction.kind == "s" else UNSIGNED)[bits]
    x, distance = read(1, bits).view(own), read(2, 32)
    limited = np.minimum(distance, bits - 1).astype(own)
    if instruction.words[0] == "shl":
        shifted = x << limited
    else:
        shifted = x >> limited
    if instruction.kind != "s":
        shifted = np.where(distance >= bits, own(0), shifted)
    return shifted.view(UNSIGNED[bits])


def _funnel(instruction, read):
    """shf: two registers side by side, shifted by up to 31; of 64 bits the upper (l) or the lower (r) half."""
    if instruction.words[2] != "wrap":
        raise Unknown("a funnel shift that clamps")
    both = read(1, 32).astype(U64) | (read(2, 32).astype(U64) << U64(32))
    distance = (read(3, 32) & U32(31)).astype(U64)
    return ((both << distance >> U64(32)) if instruction.words[1] == "l" else both >> distance).astype(U32)


def _extract(instruction, read):
    """bfe: `count` bits from bit `start` up, with their sign for s32."""
    x, start, count = read(1, 32).astype(U64), read(2, 32).astype(U64), read(3, 32).astype(U64)
    field = (x >> start) & ((U64(1) << count) - U64(1))
    if instruction.kind == "s":
        top = U64(64) - count
        field = ((field << top).view(I64) >> top.view(I64)).view(U64)
    return field.astype(U32)


def _insert(instruction, read):
    """bfi: the lowest `count` bits of the first into the second, from bit `start` up."""
    x, into, start, count = (read(i, 32).astype(U64) for i in (1, 2, 3, 4))
    mask = ((U64(1) << count) - U64(1)) << start
    return ((into & ~mask) | ((x << start) & mask)).astype(U32)


def _permute(instruction, read):
    """prmt: each byte of the result is one of eight, or that one's sign over all its bits."""
    if instruction.words != ("prmt", "b32"):
        raise Unknown("a mode of prmt")
    both = read(1, 32).astype(U64) | (read(2, 32).astype(U64) << U64(32))
    selector = read(3, 32)
    permuted = np.zeros_like(selector)
    for place in range(4):
        choice = (selector >> U32(4 * place)) & U32(0xF)
        byte = ((both >> ((choice & U32(7)).astype(U64) * U64(8))) & U64(0xFF)).astype(U32)
        byte = np.where(choice & U32(8), np.where(byte & U32(0x80), U32(0xFF), U32(0)), byte)
        permuted |= byte << U32(8 * place)
    return permuted


def _any_logic(instruction, read):
    """lop3: a function of three bits, given by its table of eight."""
    x, y, z = (read(i, 32) for i in (1, 2, 3))
    table, total = int(instruction.operands[4], 0), np.zeros_like(x)
    for line in range(8):
        if table >> line & 1:
            total |= (x if line & 4 else ~x) & (y if line & 2 else ~y) & (z if line & 1 else ~z)
    return total


def _convert(instruction, read):
    """cvt. The last word is the type that it comes from; before it, the type that it becomes."""
    *how, to, source = instruction.words[1:]
    if how not in ([], ["rn"], ["rz"]) or (how == ["rz"] and not to.startswith("bf16")):
        raise Unknown(f"conversion {'.'.join(instruction.words)}")
    if source == "f32" and to in ("bf16", "bf16x2", "f16", "f16x2"):
        values = [read(i, 32) for i in range(1, len(instruction.operands))]
        rounded = [floats.to_bf16(x, *how) if to.startswith("b") else floats.to_f16(x) for x in values]
        return floats.pair(rounded[1], rounded[0]) if to.endswith("x2") else rounded[0].astype(U16)
    if (to, source) == ("f32", "bf16"):
        return read(1, 16).astype(U32) << U32(16)
    if (to, source) == ("f32", "f16"):
        return floats.bits_of(read(1, 16).view(F16).astype(F32))
    if to[0] not in "sub" or source[0] not in "sub" or how:
        raise Unknown(f"conversion {'.'.join(instruction.words)}")
    bits, new = int(source[1:]), int(to[1:])
    x = read(1, bits)
    if source[0] == "s":
        x = x.view(SIGNED[bits])
    converted = x.astype(UNSIGNED[new])
    return converted.astype(U16) if new == 8 else converted  # no register is smaller


def _flushing_product(instruction, read):
    """mul.ftz: subnormal factors and products are zeros of their sign."""
    x, y = (floats.flushed(read(i, 32)) for i in (1, 2))
    return floats.flushed(FLOATS["mul"](F32, x, y))


def _near_quotient(instruction, read):
    """div.full: here it is off by up to two units in the last place, one way or the other, as a GPU's may be."""
    x, y = read(1, 32), read(2, 32)
    quotient = FLOATS["div"](F32, x, y)
    error = ((x ^ y) * U32(0x9E3779B1) >> U32(16)) % U32(5) - U32(2)
    a_number = np.isfinite(quotient.view(F32)) & (quotient << U32(1) > U32(2 << 24))
    return np.where(a_number, quotient + error, quotient)


def _near_reciprocal(instruction, read):
    """rcp.approx.ftz: off by up to one unit in the last place, one way or the other."""
    x = floats.flushed(read(1, 32))
    exact = FLOATS["div"](F32, np.full_like(x, 0x3F800000), x)
    error = (x * U32(0x9E3779B1) >> U32(16)) % U32(3) - U32(1)
    a_number = np.isfinite(exact.view(F32)) & (exact << U32(1) > U32(2 << 24))
    return floats.flushed(np.where(a_number, exact + error, exact))


SPECIAL = {
    "setp": _compare,
    "mov": _move,
    "selp": _select,
    "shl": _shift,
    "shr": _shift,
    "shf": _funnel,
    "bfe": _extract,
    "bfi": _insert,
    "prmt": _permute,
    "lop3": _any_logic,
    "cvt": _convert,
}

APPROXIMATE = {
    ("mul", "ftz", "f32"): _flushing_product,
    ("div", "full", "f32"): _near_quotient,
    ("rcp", "approx", "ftz", "f32"): _near_reciprocal,
}
