# SPDX-License-Identifier: Apache-2.0
"""Links and bytes of several machines, by hand."""

import math
import re
from pathlib import Path

import pytest

from megatron_comp.predict.hardware import Interconnect, Shares, assumed_calibration, gpu_of, links_of, wire_of
from megatron_comp.predict.machines import Machines
from megatron_comp.wire.calibration import Link
from megatron_comp.wire.codec import Codec
from megatron_comp.wire.cost import sum_seconds
from megatron_comp.wire.traffic import received_bytes, ring_bytes

LINK = Interconnect(1, 20, "1e9 bytes per second, a hop in 20 us", reached=1.0)
INSIDE = Interconnect(100, 2, "", reached=1.0)
INT4 = Codec.parse("int4:32:fp16")  # 4.5 bits per value: 0.28125 of 16


def test_bytes_that_cross_to_two_machines_of_eight():
    """M bytes in 16 bits, per card of 8: a ring's 2 x 15/16; an all-to-all's 8 x 8 slices of 1/16, and a ring's pass of
    messages; between two machines one message of each share."""
    machines, shape = Machines(2, 8, LINK, INSIDE, cards=8), (1024, 8192)
    whole = 1024 * 8192 * 2

    def per_card(codec, algorithm):
        return machines.bytes_across(shape, 2, codec, algorithm) / 8 / whole

    assert per_card(None, "all_reduce") == 2 * 15 / 16 / 8 == 0.234375
    assert per_card(INT4, "two_step") == 8 * 8 / 16 * 0.28125 / 8 + 15 / 16 * 0.28125 / 8
    assert per_card(INT4, "two_step") == pytest.approx(0.141 + 0.033, abs=1e-3)
    assert per_card(INT4, "hierarchical") == 0.28125 / 8 == 0.03515625
    assert per_card(INT4, "gather_sum") == 15 * 0.28125 / 8


def test_bytes_that_cross_to_three_machines():
    """Hierarchical sums go in two steps: shares of 30 rows, of which each machine sums 10."""
    machines = Machines(3, 2, LINK, INSIDE)
    message = INT4.message_bytes((10, 64))
    assert machines.bytes_across((60, 64), 2, INT4, "hierarchical") == 2 * (2 * message + 2 * message)
    assert machines.bytes_across((60, 64), 2, INT4, "two_step") == 2 * 4 * message + 5 * message


def test_links_of_two_machines_of_two():
    machines = Machines(2, 2, LINK, INSIDE, rtt=1e-3)
    us = 1e-6
    links = machines.links()
    assert links["all_reduce"] == Link(1e9, pytest.approx((2 * 2 + 2 * 520) * us))
    assert links["all_gather"] == links["reduce_scatter"] == Link(1e9, pytest.approx((2 * 520 + 2) * us))
    # Three messages of b to a rank: of the 4 b that come to the machine each takes b / 1e9 seconds.
    assert links["all_to_all"] == Link(pytest.approx(3e9 / 4), pytest.approx((2 + 2 * 20 + 500) * us))
    assert machines.links_across() == dict.fromkeys(("all_gather", "all_to_all"), Link(5e8, pytest.approx(520 * us)))
    assert machines.links_inside() == dict.fromkeys(("all_gather", "all_to_all"), Link(100e9, pytest.approx(2 * us)))


def test_one_gpu_per_machine_is_one_rank_per_link():
    """But for the stock sum's latency, a tree's."""
    links, flat = Machines(4, 1, LINK, INSIDE).links(), links_of(LINK, 4)
    for name in ("reduce_scatter", "all_gather", "all_to_all"):
        assert links[name].bytes_per_s == pytest.approx(flat[name].bytes_per_s)
        assert links[name].latency_s == pytest.approx(flat[name].latency_s)
    assert links["all_reduce"] == Link(1e9, pytest.approx(2 * math.log2(4) * 20e-6))


def test_the_slower_of_card_and_inside_decides():
    assert Machines(2, 8, LINK, INSIDE, cards=8).links()["all_gather"].bytes_per_s == 8e9
    slow = Machines(2, 8, LINK, Interconnect(2, 2, "", reached=1.0), cards=8).links()
    assert slow["all_gather"].bytes_per_s == slow["all_reduce"].bytes_per_s == 2e9
    # 8 x 8 messages across at 8e9, while 7 come from inside at 2e9: 8 against 3.5 nanoseconds per byte.
    assert slow["all_to_all"].bytes_per_s == pytest.approx(15e9 / 8)


def test_the_slowest_machine_decides():
    made = Machines.of_options(2, 4, "1gbit,100mbit", "nvlink3", 1, "200us")
    assert made.link == wire_of("100mbit") and made.rtt == pytest.approx(2e-4)
    assert made.rate == pytest.approx(0.9 * 100e6 / 8)
    with pytest.raises(ValueError, match="one for each of 2 machines"):
        Machines.of_options(2, 4, "1gbit,1gbit,1gbit", "nvlink3", 1, "0")
    with pytest.raises(ValueError, match="--rtt '5' is no round trip"):
        Machines.of_options(2, 4, "1gbit", "nvlink3", 1, "5")
    with pytest.raises(ValueError, match="--inside 'fast' is no rate"):
        Machines.of_options(2, 4, "1gbit", "fast", 1, "0")


def test_a_hierarchical_sum_by_hand():
    """Raw halves inside, a message of a half across that shares the card with the other rank's, two such inside."""
    machines, shape = Machines(2, 2, LINK, INSIDE), (64, 1024)
    known = machines.calibration(gpu_of("A100"), Shares(), [], 2)
    message = INT4.message_bytes((32, 1024))
    wire = 2e-6 + 32 * 1024 * 2 / 100e9 + 20e-6 + message / 0.5e9 + 2e-6 + 2 * message / 100e9
    assert sum_seconds(shape, INT4, 4, "hierarchical", known, machines.islands) == pytest.approx(wire)
    assert known.codecs == assumed_calibration(gpu_of("A100"), LINK, Shares(), [], 4).codecs


def test_the_bytes_beside_distributed_llama():
    """The table of docs/distributed-llama.md: (N - 1) rows of 34 bytes per 32 values, 64 sums of 4096, and ours."""
    page = (Path(__file__).parents[2] / "docs/distributed-llama.md").read_text()
    table = re.findall(r"^\| (.+?) \| (\d+) \| (\d+) \| (\d+) \|$", page, re.M)
    sums, prompt, tokens = 64, (1024, 4096), 1024

    def kilobytes(codec, algorithm):
        of_ranks = [received_bytes(prompt, Codec.parse(codec), ranks, algorithm, 0) for ranks in (2, 4, 8)]
        return [round(sums * nbytes / tokens / 1e3) for nbytes in of_ranks]

    peer = [round((ranks - 1) * 34 / 32 * 4096 * sums / 1e3) for ranks in (2, 4, 8)]
    expected = [
        [round(sums * ring_bytes(4096 * 2, ranks) / 1e3) for ranks in (2, 4, 8)],
        peer,
        peer,
        kilobytes("int4:32:fp16:hadamard", "gather_sum"),
        kilobytes("int5:32:fp16:hadamard", "two_step"),
    ]
    assert kilobytes("int8:32:fp16", "gather_sum") == peer
    assert [[*map(int, row[1:])] for row in table] == expected
