# SPDX-License-Identifier: Apache-2.0
"""What compilers may make of the kernels: no spills, wide accesses, room for enough threads."""

from megatron_comp.wire import message
from megatron_comp.wire.formats import Format, Levels

# What must fit at once: blocks on an NVIDIA SM, waves on an AMD SIMD, so that some wait for memory while others count.
# These are what the compilers reach, less some slack; a change that costs a step of it should be a decision.
ROOM = {
    # op: {what the codec has: (blocks, waves)}
    "encode": {
        **{"": (6, 8), "odd width": (6, 8), "levels": (6, 8)},
        **{"asym": (5, 8), "row scales": (4, 6), "hadamard": (5, 8)},
    },
    "decode_sum": {
        **{"": (3, 4), "odd width": (2, 4), "levels": (3, 3)},
        **{"asym": (3, 4), "row scales": (4, 6), "hadamard": (2, 1)},
    },
    "decode_sum_encode": {
        **{"": (4, 4), "odd width": (3, 4), "levels": (3, 4)},
        **{"asym": (4, 4), "row scales": (3, 4), "hadamard": (2, 2)},
    },
}
SM_REGISTERS, SIMD_REGISTERS = 65536, 512  # of 32 bits: an SM's in all, a SIMD's for each lane of a wave

# (triton, target, op, codec): instructions that spill and reload, as all loads are begun before the first addition.
SPILLS = {("3.7.1", "sm_90", "decode_sum", "paper-llama3-70b"): 6}


def complaints(row):
    """Whatever is wrong with one compiled kernel."""
    fmt, op, found = Format.parse(row["codec"]), row["op"], row["accesses"]
    allowed = SPILLS.get((row["triton"], row["target"], op, row["codec"]), 0)
    if row["spills"] > allowed:
        yield f"{row['spills']} spills"

    kinds = {"hadamard": fmt.hadamard, "row scales": fmt.scale.row_scaled, "asym": fmt.asym}
    kinds |= {"levels": isinstance(fmt.element, Levels)}
    kinds |= {"odd width": fmt.element.bits.bit_count() > 1, "": True}
    blocks, waves = ROOM[op][next(kind for kind, it_is in kinds.items() if it_is)]
    registers = -(-row["registers"] // 8) * 8  # as they are given out
    amd = row["target"].startswith("gfx")
    most = SIMD_REGISTERS // waves if amd else SM_REGISTERS // (blocks * row["threads"])
    if registers > most:
        yield f"{row['registers']} registers of {most} for {f'{waves} waves' if amd else f'{blocks} blocks'}"

    # The tensor's side in vectors; the message's side in words, or 16 bits for fields of that width. Scales of a byte
    # are loaded one by one, each by the threads that hold its block. Single bytes that are stored are the zeros that
    # fill up a section.
    tensor, message_side = {"encode": ("load", "store"), "decode_sum": ("store", "load")}.get(op, (None, None))
    if tensor and any(f"{tensor} {size}" in found for size in (1, 2, 4, 8)):
        yield f"the tensor is accessed by less than 16 bytes: {found}"
    if tensor and f"{tensor} 16" not in found:
        yield f"the tensor is not accessed by 16 bytes: {found}"
    sections = [section for field in message.layout(fmt, 1, fmt.block).fields.values() for section in field]
    scales_alone = op != "encode" and fmt.scale.bits <= 8
    if ("load 1" in found and not scales_alone) or found.get("store 1", 0) > (op != "decode_sum") * len(sections):
        yield f"codes are accessed byte by byte: {found}"
    if ("load 2" in found and not scales_alone or "store 2" in found) and all(each.width != 16 for each in sections):
        yield f"codes are accessed by 16 bits: {found}"
    if not any(f"{way} {size}" in found for way in [message_side or "load"] for size in (4, 8, 16)):
        yield f"codes are not accessed by words: {found}"

    if row["long_divisions"]:
        yield f"{row['long_divisions']} divisions of 64 bits, a hundred instructions each"
