# SPDX-License-Identifier: Apache-2.0
"""Blocks of threads in lockstep: a register is a numpy array with one value per thread of all the blocks.

All threads take each instruction together. Blocks that disagree on a branch go on one after another; threads of one
block that do are a fault: Triton makes no such branch. Warps that run ahead of each other are not played; that none
could is what `memory.Shared` checks, between barriers.
"""

import copy
import re

import floats
import instructions
import numpy as np
from instructions import SIGNED, UNSIGNED, compare_floats
from memory import WARP, Fault, Global, Shared, Unknown
from program import Instruction, Program, registers

U16, U32, U64 = np.uint16, np.uint32, np.uint64
MOST_STEPS = 2_000_000  # more is a loop without an end
GARBAGE = 0x5A5A5A5A5A5A5A5A  # what nobody wrote: whatever it is must not matter


class Blocks:
    """Blocks of a grid, block (x, y) by its number x + y * width.

    arguments: each parameter's value as an integer, by its name.
    """

    def __init__(
        self, program: Program, arguments: dict, memory: Global, shared_bytes: int, numbers: list[int], grid: tuple
    ):
        self.program, self.memory = program, memory
        self.numbers = np.array(numbers)
        thread, block = np.tile(np.arange(program.threads), len(numbers)), np.repeat(self.numbers, program.threads)
        self.shared = Shared(shared_bytes, program.threads // WARP, len(numbers))
        self.threads = block * program.threads + thread  # numbered over the whole grid
        self.registers, self.products = {}, {}
        self.special = {"%tid.x": thread, "%laneid": thread % WARP, "%ntid.x": program.threads}
        self.special |= {
            "%ctaid.x": block % grid[0],
            "%ctaid.y": block // grid[0],
            "%ctaid.z": 0,
            "%nctaid.x": grid[0],
            "%nctaid.y": grid[1],
        }
        self.special |= {"%tid.y": 0, "%tid.z": 0, "global_smem": 0, "true": -1, "false": 0}
        # Parameters have addresses too: code may choose between them before it loads.
        self.parameters = np.frombuffer(b"".join(value.to_bytes(8, "little") for value in arguments.values()), np.uint8)
        self.special |= {name: 8 * place for place, name in enumerate(arguments)}
        self._count()

    def _count(self) -> None:
        """What follows from how many blocks there are."""
        self.lane = np.arange(len(self.threads)) % WARP
        self.warp_start = np.arange(len(self.threads)) - self.lane
        self.everyone = np.ones(len(self.threads), bool)
        self.constants = {}  # what operands that no instruction changes read as, by their text and width
        for constant in (self.lane, self.warp_start, self.everyone):
            constant.flags.writeable = False

    def _part(self, chosen: np.ndarray) -> "Blocks":
        """Those of the blocks for which `chosen` is true, as they are now."""
        threads = np.repeat(chosen, self.program.threads)
        part = copy.copy(self)
        part.numbers, part.threads, part.shared = self.numbers[chosen], self.threads[threads], self.shared.part(chosen)
        part.registers = {name: value[threads] for name, value in self.registers.items()}
        part.products = {name: [factor[threads] for factor in both] for name, both in self.products.items()}
        part.special = {
            name: value[threads] if isinstance(value, np.ndarray) else value for name, value in self.special.items()
        }
        part._count()
        return part

    def run(self, place: int = 0) -> None:
        """From the instruction at `place` to the end."""
        for _ in range(MOST_STEPS):
            if place == len(self.program.code):
                return
            instruction = self.program.code[place]
            leaving = self._execute(instruction)
            if leaving is None or not leaving.any():
                place += 1
            elif leaving.all():
                returns = instruction.words[0] == "ret"
                place = len(self.program.code) if returns else self.program.labels[instruction.operands[0]]
            else:
                self._part(leaving).run(place)
                return self._part(~leaving).run(place)
        raise Fault(f"no end after {MOST_STEPS} instructions")

    def _execute(self, instruction: Instruction) -> np.ndarray | None:
        """Of a branch or return: which blocks take it."""
        try:
            active = self._active(instruction)
            operation = instruction.words[0]
            if operation in ("bra", "ret"):
                return self._agreed(active)
            if operation in TOGETHER:
                TOGETHER[operation](self, instruction, active)
            else:
                self._write(instruction.operands[0], self._result(instruction), active)
                if self.program.contracts and instruction.words == ("mul", "f32"):
                    factors = [self._read(operand, 32) for operand in instruction.operands[1:]]
                    self.products[instruction.operands[0]] = factors
        except Fault as fault:
            blocks = ", ".join(map(str, self.numbers))
            raise Fault(f"{fault}; in blocks {blocks}: {instruction.text}") from None
        except Exception as error:
            raise Unknown(f"{type(error).__name__}: {error}: {instruction.text}") from error

    # Registers.

    def _active(self, instruction: Instruction) -> np.ndarray:
        """bool: the threads that take part; `everyone` itself if all do."""
        if instruction.guard is None:
            return self.everyone
        predicate, value = instruction.guard
        active = self.registers[predicate] == value
        return self.everyone if active.all() else active

    def _agreed(self, active: np.ndarray) -> np.ndarray:
        """bool per block: whether its threads take a branch, all of them or none."""
        by_block = active.reshape(len(self.numbers), -1)
        if (by_block != by_block[:, :1]).any():
            raise Fault("threads of a block part")
        return by_block[:, 0]

    def _read(self, operand: str, bits: int) -> np.ndarray:
        """A register, number or special value as unsigned integers; as booleans if bits is 1."""
        if bits == 1:
            negated, name = operand.startswith("!"), operand.lstrip("!")
            value = self.registers.get(name)
            value = np.full(len(self.lane), name not in ("0", "false")) if value is None else value
            return value != negated
        value = self.registers.get(operand)
        if value is not None:
            return value.astype(UNSIGNED[bits], copy=False)
        if (operand, bits) not in self.constants:
            self.constants[operand, bits] = value = self._constant(operand, UNSIGNED[bits])
            value.flags.writeable = False
        return self.constants[operand, bits]

    def _constant(self, operand: str, dtype: type) -> np.ndarray:
        if operand in self.special:
            return np.broadcast_to(np.asarray(self.special[operand]), self.lane.shape).astype(dtype)
        if operand.startswith("%"):
            number = GARBAGE
        elif operand.startswith("0f"):  # fp32 by its bits
            number = int(operand[2:], 16)
        else:
            number = int(operand.rstrip("U"), 0)
        return np.full(len(self.lane), number & np.iinfo(dtype).max, dtype)

    def _write(self, register: str, value: np.ndarray, active: np.ndarray) -> None:
        """Threads that are not active keep what they had."""
        self.products.pop(register, None)
        if active is not self.everyone:
            old = self.registers.get(register)
            old = np.full(len(value), GARBAGE).astype(value.dtype) if old is None else old
            value = np.where(active, value, old.astype(value.dtype, copy=False))
        self.registers[register] = value

    def _result(self, instruction: Instruction) -> np.ndarray:
        def read(i, bits, part=None):
            operand = instruction.operands[i]
            return self._read(operand if part is None else registers(operand)[part], bits)

        if instruction.words == ("add", "f32"):
            # ptxas may make one operation, which rounds once, of an addition to a product: here it does.
            for product, other in ((1, 2), (2, 1)):
                if factors := self.products.get(instruction.operands[product]):
                    return floats.fma(np.float32, *factors, read(other, 32))
        return instructions.result(instruction, read)

    # Memory.

    def _addresses(self, operand: str, bits: int) -> np.ndarray:
        """Of `[%rd1+16]`."""
        base, offset = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand).groups()
        return (self._read(base, bits).astype(np.int64) + int(offset or "0", 0)).astype(U64)

    def _load(self, instruction: Instruction, active: np.ndarray) -> None:
        space = instruction.words[1]
        targets, width = registers(instruction.operands[0]), instruction.bits // 8
        addresses = self._addresses(instruction.operands[1], 32 if space == "shared" else 64)[active]
        if active.any():
            if space == "param":
                data = self.parameters[addresses.astype(np.int64)[:, None] + np.arange(width * len(targets))]
            elif space == "global":
                data = self.memory.load(addresses, width * len(targets), self.threads[active])
            else:
                data = self.shared.load(addresses, width * len(targets), active)
            for i, register in enumerate(targets):
                raw = np.zeros((len(self.lane), 8), np.uint8)
                raw[active, :width] = data[:, i * width : (i + 1) * width]
                value = raw.view(U64)[:, 0]
                if instruction.kind == "s":  # extended by its sign, where the register is wider
                    value = value.astype(UNSIGNED[8 * width]).view(SIGNED[8 * width])
                self._write(register, value.astype(_type_of(register)), active)

    def _store(self, instruction: Instruction, active: np.ndarray) -> None:
        space, width = instruction.words[1], instruction.bits // 8
        if not active.any():
            return
        sources = [self._read(register, 64) for register in registers(instruction.operands[1])]
        data = np.concatenate([source.view(np.uint8).reshape(-1, 8)[:, :width] for source in sources], axis=1)[active]
        addresses = self._addresses(instruction.operands[0], 64 if space == "global" else 32)[active]
        if space == "global":
            self.memory.store(addresses, data, self.threads[active])
        else:
            self.shared.store(addresses, data, active)

    # What threads of a warp or of the block do together.

    def _barrier(self, instruction: Instruction, active: np.ndarray) -> None:
        """bar.sync for all threads; bar.warp.sync orders a warp, which is in order already."""
        if active is not self.everyone:
            raise Fault("not all threads come to the barrier")
        if instruction.words[1] == "sync":
            self.shared.barrier()

    def _shuffle(self, instruction: Instruction, active: np.ndarray) -> None:
        value, distance = self._read(instruction.operands[1], 32), self._read(instruction.operands[2], 32)
        lane, distance = self.lane, distance.astype(np.int64)
        way = instruction.words[2]
        source = {"bfly": lane ^ distance, "idx": distance % WARP, "down": lane + distance, "up": lane - distance}[way]
        source = np.where((source >= 0) & (source < WARP), source, lane)
        if active is not self.everyone:
            raise Fault("a shuffle without all threads")
        self._write(instruction.operands[0].split("|")[0], value[self.warp_start + source], active)

    def _reduce_warp(self, instruction: Instruction, active: np.ndarray) -> None:
        """redux.sync: min, max, add, or of the threads in each thread's mask."""
        how, kind = instruction.words[2:4]
        value, members = self._read(instruction.operands[1], 32), self._read(instruction.operands[2], 32)
        wide = (value.view(np.int32) if kind == "s32" else value).astype(np.int64).reshape(-1, 1, WARP)
        inside = (members.reshape(-1, WARP, 1) >> np.arange(WARP, dtype=U32)) & U32(1) == 1
        if not inside.diagonal(axis1=1, axis2=2).all():
            raise Fault("a thread outside of its own mask")
        neutral, reduce = {
            "max": (-(1 << 40), np.maximum),
            "min": (1 << 40, np.minimum),
            "add": (0, np.add),
            "or": (0, np.bitwise_or),
        }[how]
        total = reduce.reduce(np.where(inside, wide, neutral), axis=2).reshape(-1)
        self._write(instruction.operands[0], total.astype(U32), active)

    def _load_matrix(self, instruction: Instruction, active: np.ndarray) -> None:
        """ldmatrix: 8 x 8 of 16 bits per register; lane i of each 8 holds a row's address."""
        addresses = self._addresses(instruction.operands[1], 32)
        for i, register in enumerate(registers(instruction.operands[0])):
            parts = [self.shared.load(at, 2, active) for at in self._matrix(instruction, addresses, i)]
            low, high = (np.ascontiguousarray(part).view(U16)[:, 0] for part in parts)
            self._write(register, floats.pair(low, high), active)

    def _store_matrix(self, instruction: Instruction, active: np.ndarray) -> None:
        addresses = self._addresses(instruction.operands[0], 32)
        for i, register in enumerate(registers(instruction.operands[1])):
            halves = floats.halves(self._read(register, 32))
            for at, half in zip(self._matrix(instruction, addresses, i), halves):
                self.shared.store(at, half.view(np.uint8).reshape(-1, 2), active)

    def _matrix(self, instruction, addresses, number):
        """Where each thread's low and high half of matrix `number` stand.

        A thread has two neighbours of a row, or with `trans` of a column.
        """
        lane = self.lane
        for half in range(2):
            row, column = lane // 4, 2 * (lane % 4) + half
            if "trans" in instruction.words:
                row, column = column, row
            rows = addresses[self.warp_start + 8 * number + row]
            if (rows % U64(16)).any():
                raise Fault("a matrix's row is not on 16 bytes")
            yield rows + U64(2) * column.astype(U64)

    def _compare_pair(self, instruction: Instruction, active: np.ndarray) -> None:
        """setp of two fp16 in a register, which writes two predicates."""
        pairs = [floats.halves(self._read(operand, 32)) for operand in instruction.operands[1:3]]
        for predicate, x, y in zip(instruction.operands[0].split("|"), *pairs):
            self._write(predicate, compare_floats(instruction.words[1], x.view(np.float16), y.view(np.float16)), active)

    def _setp(self, instruction: Instruction, active: np.ndarray) -> None:
        if instruction.words[-1] == "f16x2":
            return self._compare_pair(instruction, active)
        self._write(instruction.operands[0], self._result(instruction), active)

    def _move(self, instruction: Instruction, active: np.ndarray) -> None:
        """mov, of which `{%rs1, %rs2}, %r1` takes a register apart."""
        targets = registers(instruction.operands[0])
        if len(targets) == 1:
            return self._write(targets[0], self._result(instruction), active)
        half = instruction.bits // 2
        whole = self._read(instruction.operands[1], instruction.bits)
        for i, register in enumerate(targets):
            self._write(register, (whole >> whole.dtype.type(half * i)).astype(UNSIGNED[half]), active)


def _type_of(register: str) -> type:
    return {"%rs": U16, "%rd": U64}.get(register[:3], U32)


TOGETHER = {
    "ld": Blocks._load,
    "st": Blocks._store,
    "bar": Blocks._barrier,
    "shfl": Blocks._shuffle,
    "redux": Blocks._reduce_warp,
    "ldmatrix": Blocks._load_matrix,
    "stmatrix": Blocks._store_matrix,
    "setp": Blocks._setp,
    "mov": Blocks._move,
}
