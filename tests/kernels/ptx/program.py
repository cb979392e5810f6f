# SPDX-License-Identifier: Apache-2.0
"""PTX text, as Triton writes it, to instructions in order."""

import re
from dataclasses import dataclass
from functools import cached_property

from memory import Unknown

# Lines that describe the code and are not instructions.
DIRECTIVES = (".reg", ".loc", ".file", ".section", ".pragma", ".b8", ".b32", ".b64", "{", "}")


@dataclass(frozen=True)
class Instruction:
    """`@!%p1 st.global.v4.b32 [%rd1], {%r1, %r2, %r3, %r4};`

    guard: the predicate register and the value that lets a thread take part, ("%p1", False) here; None for all threads.
    words: ("st", "global", "v4", "b32"). operands: ["[%rd1]", "{%r1, ...}"].
    """

    text: str
    guard: tuple[str, bool] | None
    words: tuple[str, ...]
    operands: list[str]

    @cached_property
    def kind(self) -> str:
        """b, u, s or f: the letter of the last type; "pred" for predicates."""
        return "pred" if self.words[-1] == "pred" else self.words[-1][0]

    @cached_property
    def bits(self) -> int:
        """Of the last type: 32 in `cvt.rn.bf16.f32`."""
        return int(re.search(r"\d+$", self.words[-1]).group())


@dataclass(frozen=True)
class Program:
    """One kernel. params: (type, name) in the order of the launch. labels: the place of the instruction that follows.

    contracts: whether the assembler may make one fused operation of a multiplication and an addition.
    """

    name: str
    params: list[tuple[str, str]]
    threads: int
    code: list[Instruction]
    labels: dict[str, int]
    contracts: bool

    @classmethod
    def parse(cls, ptx: str, contracts: bool = False) -> "Program":
        name, params, attributes, body = re.search(r"\.entry\s+(\w+)\((.*?)\)(.*?)\{(.*)\n\}", ptx, re.S).groups()
        code, labels = [], {}
        for line in re.split(r"[;\n]", re.sub(r"//.*", "", body)):
            line = line.strip()
            while label := re.match(r"(\$\w+):\s*", line):
                labels[label.group(1)] = len(code)
                line = line[label.end() :]
            if line and not line.startswith(DIRECTIVES):
                code.append(_instruction(line))
        return cls(
            name,
            re.findall(r"\.param\s+\.(\w+)(?:\s+\.ptr\s+\.\w+\s+\.align\s+\d+)?\s+(\w+)", params),
            int(re.search(r"\.reqntid\s+(\d+)", attributes).group(1)),
            code,
            labels,
            contracts,
        )


def _instruction(line: str) -> Instruction:
    parts = re.match(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", line, re.S)
    if not parts:
        raise Unknown(f"{line!r}")
    negated, predicate, words, operands = parts.groups()
    guard = (predicate, not negated) if predicate else None
    # Commas inside braces separate the registers of one vector operand.
    operands = [operand.strip() for operand in re.split(r",(?![^{]*\})", operands) if operand.strip()]
    return Instruction(line, guard, tuple(words.split(".")), operands)


def registers(operand: str) -> list[str]:
    """Of a vector operand `{%r1, %r2}`, or of a single register."""
    return [register.strip() for register in operand.strip("{} ").split(",")]
