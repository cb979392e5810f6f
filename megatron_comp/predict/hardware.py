# SPDX-License-Identifier: Apache-2.0
"""Peaks of GPUs and links, as rows of data with their sources, and what share of a peak is reached.

Peaks are the makers'. Shares and fixed costs are assumptions, the same for every row; `published.py` fits its own for
the systems that it is checked on, and says to which rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..launcher import network

if TYPE_CHECKING:
    from ..wire.calibration import Calibration, Link
    from ..wire.codec import Codec


@dataclass(frozen=True)
class Gpu:
    """tflops: dense 16-bit peak. memory_gb_s, memory_gb: rate and size of its memory, in 1e9 bytes (per second)."""

    tflops: float
    memory_gb_s: float
    source: str
    memory_gb: float = 0.0


GPUS = {
    "L4": Gpu(121, 300, "NVIDIA L4 data sheet: 242 TFLOPS with sparsity", 24),
    "L40": Gpu(181, 864, "NVIDIA L40 data sheet", 48),
    "L40S": Gpu(362, 864, "NVIDIA L40S data sheet", 48),
    "RTX4090": Gpu(165, 1008, "NVIDIA Ada architecture paper: fp32 accumulation", 24),
    "A100": Gpu(312, 2039, "NVIDIA A100 80GB SXM data sheet", 80),
    "A100-PCIe": Gpu(312, 1935, "NVIDIA A100 80GB PCIe data sheet", 80),
    "H100": Gpu(989, 3350, "NVIDIA H100 SXM data sheet", 80),
    "H200": Gpu(989, 4800, "NVIDIA H200 SXM data sheet", 141),
    "MI300X": Gpu(1307, 5300, "AMD Instinct MI300X data sheet", 192),
}


@dataclass(frozen=True)
class Interconnect:
    """gb_s: what a GPU receives at once, in 1e9 bytes per second. hop_us: for a message to the next rank to start.
    reached: what share of gb_s collectives get."""

    gb_s: float
    hop_us: float
    source: str
    reached: float = 0.8


# Between cards that cannot read each other's memory, every byte goes through the host's: L40s reach a fifth of their
# PCIe (fitted to the share of sums that arXiv 2412.04964 gives), L4s less. Cards that can (-p2p) are assumed to reach
# 60 %: nobody has measured that here.
VIA_HOST = 0.2
PEER = 0.6

WIRES = {
    "pcie3x16": Interconnect(16, 5, "PCIe 3.0 x16, one direction, through the host's memory", VIA_HOST),
    "pcie4x16": Interconnect(32, 5, "PCIe 4.0 x16, one direction, through the host's memory", VIA_HOST),
    "pcie5x16": Interconnect(64, 5, "PCIe 5.0 x16, one direction, through the host's memory", VIA_HOST),
    "pcie4x16-p2p": Interconnect(32, 3, "PCIe 4.0 x16, one direction, from card to card", PEER),
    "pcie5x16-p2p": Interconnect(64, 3, "PCIe 5.0 x16, one direction, from card to card", PEER),
    "nvlink3": Interconnect(300, 2, "NVLink 3 of an A100, one direction"),
    "nvlink4": Interconnect(450, 2, "NVLink 4 of an H100 or H200, one direction"),
    "xgmi3": Interconnect(448, 2, "Infinity Fabric of an MI300X with 7 peers, one direction"),
}


def wire_of(text: str, option: str = "--link") -> Interconnect:
    """A name of the table, or a network's rate such as 100mbit or 2.5gbit, a hop on which starts in 25 us.

    option: that messages name. Framing takes 4 % of a shaped 100 Mbit/s link, measured; the rest of what is not reached
    is an allowance.
    """
    if text in WIRES:
        return WIRES[text]
    try:
        bits = network.bits_per_second(text)
    except ValueError as error:
        raise ValueError(f"{option} {error}, or {', '.join(WIRES)}") from None
    if bits is None:
        raise ValueError(f"{option} {text}: a rate is needed, as in 10gbit, or {', '.join(WIRES)}")
    return Interconnect(bits / 8 / 1e9, 25, "a network of this rate", 0.9)


def gpu_of(text: str) -> Gpu:
    for name, gpu in GPUS.items():
        if name.lower() == text.lower():
            return gpu
    raise ValueError(f"--gpu {text}: allowed are {', '.join(GPUS)}")


@dataclass(frozen=True)
class Shares:
    """What is reached of a GPU's peaks: by large matrix products, by its memory, and by codecs of the memory's rate,
    which nobody has measured on a GPU. codec_call_us: for each call of a codec to start. layer_us: for a layer's
    kernels to start, when they take less time than that."""

    compute: float = 0.6
    memory: float = 0.8
    codec: float = 0.5
    codec_call_us: float = 10.0
    layer_us: float = 200.0


def links_of(wire: Interconnect, ranks: int) -> "dict[str, Link]":
    """A ring takes N - 1 hops a pass, a gather or an all-to-all as many."""
    from ..wire.calibration import Link  # not for the tables alone, which a help text shows

    rate, hop = wire.gb_s * 1e9 * wire.reached, wire.hop_us * 1e-6 * (ranks - 1)
    links = {"all_reduce": Link(rate, 2 * hop)}
    return links | {name: Link(rate, hop) for name in ("reduce_scatter", "all_gather", "all_to_all")}


def assumed_calibration(
    gpu: Gpu, wire: Interconnect, shares: Shares, codecs: "Sequence[Codec]", ranks: int, itemsize: int = 2
) -> "Calibration":
    """What sums are predicted from."""
    from ..wire.calibration import MARGIN, Calibration, CodecCost

    memory = gpu.memory_gb_s * 1e9 * shares.codec
    costs = {}
    for codec in codecs:
        in_message = codec.bits_per_value / 8
        fixed = shares.codec_call_us * 1e-6
        # A decoded sum is written once for the values of all messages.
        costs[str(codec)] = CodecCost(
            fixed, (itemsize + in_message) / memory, fixed, (in_message + itemsize / ranks) / memory
        )
    return Calibration(links_of(wire, ranks), costs, MARGIN, {"ranks": ranks, "device": "cuda"}, "assumed from peaks")
