# SPDX-License-Identifier: Apache-2.0
"""Several machines: how long their ranks' collectives take, and how many bytes cross a machine's link.

M machines of L GPUs are N = M L ranks. A machine receives R bytes per second from the others, all its network cards
together, as it sends; a GPU receives r bytes per second inside. A message starts in a hop's time; between machines it
then flies for half of a round trip.

    ring of all ranks   Every edge carries what a rank receives, also each of the M edges between machines: the slower
                        of R and r decides. Several cards carry a part of the ring's bytes each. A pass has N - 1 hops,
                        of which min(N - 1, M) go between machines. All-gathers and reduce-scatters take one pass.
    stock sum           The rate of a ring of two passes, and the latency of a tree up and down: 2 (L - 1) hops inside
                        and 2 log2 M across, rounded up. Libraries take the one or the other by size: both at their
                        best is more than a stock sum can do, so that what compression gains is not overstated.
    all-to-all          Each of L ranks sends to each of N - L across: L (N - L) messages share R, while L - 1 come to
                        each rank at r; the slower decides. Messages start one after another and fly at once.
    one level of        Among ranks of equal place in all machines, all L places at once: R / L each, M - 1 hops or
    a hierarchical sum  messages. Inside: r, L - 1 hops or messages.

Assumptions: machines are equal, and the slowest link decides for all; the cards share a load evenly; what crosses does
not slow down what stays inside; sums have the network for themselves.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..launcher import network
from ..wire.calibration import Calibration, Link
from ..wire.codec import Codec, CodecPair
from ..wire.topology import Islands
from ..wire.traffic import received_by_level, ring_bytes, slice_rows, step_codecs
from .hardware import Gpu, Interconnect, Shares, assumed_calibration, wire_of


@dataclass(frozen=True)
class Machines:
    """gpus, cards: of each machine. link: of one card. inside: of one GPU. rtt: seconds of a round trip across, beyond
    the start of two messages."""

    count: int
    gpus: int
    link: Interconnect
    inside: Interconnect
    cards: int = 1
    rtt: float = 0.0

    @classmethod
    def of_options(cls, count: int, gpus: int, link: str, inside: str, cards: int, rtt: str) -> "Machines":
        """link: a name or a rate, or one for each machine, as in `1gbit,100mbit`.

        Raises ValueError for any other value.
        """
        links = link.split(",")
        if len(links) not in (1, count):
            raise ValueError(f"--link {link}: allowed are one rate, or one for each of {count} machines")
        slowest = min(map(wire_of, links), key=lambda wire: wire.gb_s * wire.reached)
        try:
            seconds = network.seconds_of(rtt)
        except ValueError as error:
            raise ValueError(f"--rtt {error}") from None
        return cls(count, gpus, slowest, wire_of(inside, "--inside"), cards, seconds)

    @property
    def ranks(self) -> int:
        return self.count * self.gpus

    @property
    def islands(self) -> Islands:
        return Islands.of_size(self.ranks, self.gpus)

    @property
    def rate(self) -> float:
        """Bytes per second that a machine receives."""
        return self.cards * self.link.gb_s * 1e9 * self.link.reached

    def boundary(self, copies: int) -> Link:
        """Of each of so many messages that go from a machine to another at once: no more than one card's rate."""
        return Link(self.rate / max(copies, self.cards), self._start + self.rtt / 2)

    @property
    def boundary_inside(self) -> Link:
        """Of one message from a GPU to another of its machine."""
        return Link(self.inside.gb_s * 1e9 * self.inside.reached, self.inside.hop_us * 1e-6)

    @property
    def _start(self) -> float:
        return self.link.hop_us * 1e-6

    def calibration(self, gpu: Gpu, shares: Shares, codecs: Sequence[Codec], itemsize: int) -> Calibration:
        """What sums over all ranks are predicted from."""
        known = assumed_calibration(gpu, self.inside, shares, codecs, self.ranks, itemsize)
        return replace(known, links=self.links(), inside=self.links_inside(), across=self.links_across())

    def links(self) -> dict[str, Link]:
        """Of collectives of all ranks."""
        inside = self.inside.gb_s * 1e9 * self.inside.reached
        step, across, flight = self.inside.hop_us * 1e-6, self._start + self.rtt / 2, self.rtt / 2
        hops, mates, others = self.ranks - 1, self.gpus - 1, self.ranks - self.gpus
        ring = min(self.rate, inside) if mates else self.rate
        crossings = min(hops, self.count)
        one_pass = Link(ring, crossings * across + (hops - crossings) * step)
        tree = 2 * (mates * step + math.ceil(math.log2(self.count)) * across)
        slowest = max(self.gpus * others / self.rate, mates / inside)
        return {
            "all_reduce": Link(ring, tree),
            "reduce_scatter": one_pass,
            "all_gather": one_pass,
            "all_to_all": Link(hops / slowest, mates * step + others * self._start + flight),
        }

    def links_across(self) -> dict[str, Link]:
        rate, hops, flight = self.rate / self.gpus, self.count - 1, self.rtt / 2
        return {
            "all_gather": Link(rate, hops * (self._start + flight)),
            "all_to_all": Link(rate, hops * self._start + flight),
        }

    def links_inside(self) -> dict[str, Link]:
        link = Link(self.inside.gb_s * 1e9 * self.inside.reached, (self.gpus - 1) * self.inside.hop_us * 1e-6)
        return {"all_gather": link, "all_to_all": link}

    def bytes_across(
        self, shape: tuple[int, int], itemsize: int, codec: Codec | CodecPair | None, algorithm: str
    ) -> int:
        """That a machine receives from the others in one sum. codec None: the stock one."""
        ranks = self.ranks
        if codec is None:
            return ring_bytes(math.prod(shape) * itemsize, ranks)
        if algorithm == "hierarchical":
            one = range(self.gpus)  # the ranks of the first machine, of which no other has longer messages
            return sum(received_by_level(shape, codec, algorithm, self.islands, rank, itemsize)[1] for rank in one)
        first, second = step_codecs(codec)
        if algorithm == "gather_sum":
            return (ranks - 1) * first.message_bytes(shape)
        longest = (slice_rows(shape, ranks)[0], shape[1])
        crossing = self.gpus * (ranks - self.gpus)
        return crossing * first.message_bytes(longest) + (ranks - 1) * second.message_bytes(longest)
