# SPDX-License-Identifier: Apache-2.0
"""Hierarchical sums on real gloo ranks, their machines made up: the bits of one process, and the promised bytes.

What is expected is a flat sum, in one process, over the machines' own fp32 sums (`sums.expected_hierarchical`).
"""

import itertools
from datetime import timedelta

import oracles
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from sums import Wire, digest, expected_gather_sum, expected_hierarchical, island_sums, tensor

from megatron_comp.wire import topology
from megatron_comp.wire.codec import parse_codec
from megatron_comp.wire.collectives import PendingAllReduce, PendingSum, all_reduce, reduce_scatter
from megatron_comp.wire.exchange import NEAR
from megatron_comp.wire.plan import plan_all_reduce
from megatron_comp.wire.topology import Islands
from megatron_comp.wire.traffic import received_by_level, received_by_level_scatter

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# The machine of each rank.
LAYOUTS = ["aabb", "abab", "aaabbb", "aabbcc", "aabbb", "abbb", "abccb", "abcd", "aaaa"]
TWO_LEVELS = LAYOUTS[:-2]
PAIRS = ["int4:32:fp16>int8:32:fp16", "mxfp4>mxfp8"]
SHAPES = [(1, 576), (7, 33), (5, 1), (11, 4096), (2, 3, 576), (33,), (0, 576), (2, 0, 33)]
ALIGNED = (960, 64)  # rows divide everywhere, and no section needs padding, whole or in slices
ITEMSIZE = {FP32: 4, BF16: 2, FP16: 2}


def cases(layout):
    """(operation, codec, shape, dtype, chunks); each codec meets every second shape, with the next layout the others.

    The type goes around, also with the layout.
    """
    made, types, place = [], [FP32, BF16, FP16], LAYOUTS.index(layout)
    for number, codec in enumerate([*oracles.PRESETS, *PAIRS]):
        for shape in SHAPES[(number + place) % 2 :: 2]:
            made.append(("all_reduce", codec, shape, types[(len(made) + place) % 3], None))
    made += [("all_reduce", codec, ALIGNED, BF16, None) for codec in oracles.PRESETS]
    made += [("all_reduce", codec, (200, 33), BF16, 3) for codec in ["mxfp4", "nvfp4", PAIRS[0]]]
    for number, codec in enumerate(oracles.PRESETS):
        for turn, rest in enumerate([(33,), (2, 96), (8, 0)], number + place):
            made.append(("reduce_scatter", codec, (3 * len(layout), *rest), types[turn % 3], None))
    made += [("reduce_scatter", codec, (64 * len(layout), 64), FP32, 3) for codec in oracles.PRESETS]
    return made


def uneven(rows, ranks):
    """The first rank has no row, the last has what is left."""
    each = rows // (ranks + 1)
    return [0, *[each] * (ranks - 2), rows - each * (ranks - 2)]


def islands_of(layout):
    return [[rank for rank, its in enumerate(layout) if its == name] for name in dict.fromkeys(layout)]


def run_cases(rank, ranks, layout):
    group = dist.group.WORLD
    found = topology.connect({group: Islands.of_names(layout)})[group]
    assert topology.connect({group: Islands.of_names(layout)})[group].inside is found.inside, "sub-groups are made once"
    results = []
    for number, (operation, codec, shape, dtype, chunks) in enumerate(cases(layout)):
        x = tensor(number, rank, shape, dtype)
        before, wire = digest(x), Wire(rank)
        with wire:
            if operation == "all_reduce":
                y = all_reduce(x, codec, group, "hierarchical", chunks=chunks, topology=found)
            else:
                splits = uneven(shape[0], ranks) if chunks else None
                y = reduce_scatter(x, codec, group, splits, algorithm="hierarchical", topology=found)
        assert digest(x) == before and y.dtype == dtype and y.is_contiguous()
        results.append((digest(y), y.shape, wire.sources, [name for name, _ in wire.calls]))
    return results


@pytest.fixture(scope="module", params=LAYOUTS)
def outcome(request):
    layout = request.param
    return layout, run_ranks(run_cases, len(layout), layout)


def test_all_ranks_hold_the_bits_of_one_process(outcome):
    layout, results = outcome
    ranks, islands = len(layout), islands_of(layout)
    flat = layout not in TWO_LEVELS
    wrong = []
    for number, case in enumerate(cases(layout)):
        operation, name, shape, dtype, chunks = case
        tensors, codec = [tensor(number, rank, shape, dtype) for rank in range(ranks)], parse_codec(name)
        found = [results[rank][number][0] for rank in range(ranks)]
        if operation == "reduce_scatter":
            # Islands of unequal size go the flat way.
            whole = tensors if flat or len(set(map(len, islands))) > 1 else island_sums(tensors, islands)
            splits = uneven(shape[0], ranks) if chunks else [shape[0] // ranks] * ranks
            cuts = zip(*(each.split(splits) for each in whole), strict=True)
            expected = [
                digest(expected_gather_sum(parts, codec).to(dtype) if parts[0].numel() else tensors[0].new_empty(0))
                for parts in cuts
            ]
        elif 0 in shape:
            expected = [digest(tensors[0])] * ranks
        elif flat:
            continue  # the flat algorithms have tests of their own; below, that these are what runs
        else:
            expected = [digest(expected_hierarchical(tensors, codec, islands))] * ranks
        if found != expected:
            wrong.append(f"{layout} {case}: {'ranks differ' if len(set(found)) > 1 else 'not the sum of one process'}")
    assert not wrong, "\n".join(wrong)


def test_bytes_of_each_level_are_the_promised_ones(outcome):
    layout, results = outcome
    ranks, islands = len(layout), islands_of(layout)
    gather, scatter = "_allgather_base_", "alltoall_base_"
    for number, case in enumerate(cases(layout)):
        operation, name, shape, dtype, chunks = case
        codec = parse_codec(name)
        by_machine = dict.fromkeys(layout, 0)
        for rank in range(ranks):
            _, _, sources, names = results[rank][number]
            inside = sum(size for source, size in sources.items() if layout[source] == layout[rank])
            across = sum(sources.values()) - inside
            by_machine[layout[rank]] += across
            if 0 in shape:
                assert not names
            elif layout not in TWO_LEVELS:
                flat = [{gather}, {scatter, gather}] if operation == "all_reduce" else [{scatter}]
                assert set(names) in flat and len(names) <= 2 * (chunks or 1)
            elif operation == "reduce_scatter" and len(set(map(len, islands))) > 1:
                assert set(names) == {scatter}
            elif operation == "reduce_scatter":
                splits = uneven(shape[0], ranks) if chunks else None
                its = Islands.of_names(layout)
                promised = received_by_level_scatter(shape, codec, its, rank, ITEMSIZE[dtype], splits)
                assert (inside, across) == promised, (layout, case, rank)
                assert set(names) == {scatter} and len(names) % 2 == 0
            else:
                promised = received_by_level(
                    shape, codec, "hierarchical", Islands.of_names(layout), rank, ITEMSIZE[dtype]
                )
                assert (inside, across) == promised, (layout, case, rank)
        if shape == ALIGNED and layout in TWO_LEVELS:
            # One message for each other machine, or two M-ths of it, whatever the number of ranks in a machine.
            machines, message = len(islands), oracles.message_bytes(str(codec), shape)
            share = machines - 1 if machines == 2 else 2 * (machines - 1) / machines
            assert set(by_machine.values()) == {share * message}


def test_what_flat_sums_send_across_is_counted_as_well():
    for codec, rank in itertools.product(["mxfp4", "nvfp4"], range(4)):
        message = oracles.message_bytes(str(parse_codec(codec)), ALIGNED)
        islands = Islands.of_size(4, 2)
        assert received_by_level(ALIGNED, parse_codec(codec), "gather_sum", islands, rank, 2) == (message, 2 * message)
        two_step = received_by_level(ALIGNED, parse_codec(codec), "two_step", islands, rank, 2)
        assert two_step == (message / 2, message)


# Handles, parts, refusals.


def in_other_ways(rank, ranks, layout):
    """A sum by a handle, by parts that are pushed one by one, and in one call; x is overwritten where it may be."""
    group, results = dist.group.WORLD, []
    found = topology.connect({group: Islands.of_names(layout)})[group]
    for number, codec in enumerate(["mxfp4", "int5:32:fp16:hadamard", "mxfp4>mxfp8"]):
        x = tensor(number, rank, (1000, 64), BF16)
        whole = all_reduce(x, codec, group, "hierarchical", topology=found)
        overwritten = x.clone()
        handle = all_reduce(overwritten, codec, group, "hierarchical", async_op=True, chunks=3, topology=found)
        overwritten.fill_(torch.nan)
        results.append([digest(whole), digest(handle.wait())])
        for takes in (False, True):
            plan = plan_all_reduce((1000, 64), parse_codec(codec), ranks, rank, "hierarchical", 4, None, found, 2)
            assert len(plan.chunks) == 4
            out = torch.empty_like(x)
            pending = PendingAllReduce(out, plan, group)
            for part in x.split(plan.row_counts):
                sent = part.clone()
                pending.push(sent)
                sent.fill_(torch.nan)
                pending.advance()
            if takes:
                parts = list(iter(pending.take, None))
                assert [len(part) for part in parts] == plan.row_counts
                assert digest(torch.cat(parts)) == digest(out)
            else:
                assert pending.wait() is out
            results[-1].append(digest(out))
    return results


@pytest.mark.parametrize("layout", ["aabb", "aabbb", "aabbcc"])
def test_handles_and_parts_give_the_same_bits(layout):
    results = run_ranks(in_other_ways, len(layout), layout)
    for of_codec in zip(*results, strict=True):
        assert len(set(itertools.chain(*of_codec))) == 1


def two_jobs_groups(rank, ranks):
    """Two groups of four in a job of eight, and one that is not in two levels; ranks do not name the same groups."""
    groups = [dist.new_group(ranks, timedelta(seconds=97)) for ranks in ([0, 1, 2, 3], [4, 5, 6, 7])]
    own = groups[rank // 4]
    found = topology.connect({own: Islands.of_names("aabb" if rank < 4 else "abba")})[own]
    none = topology.connect({own: Islands.of_names("aaaa")} if rank < 4 else {})
    assert all(each.inside is None and each.across is None for each in none.values())
    y = all_reduce(tensor(0, rank, (9, 40), FP32), "mxfp4", own, "hierarchical", topology=found)
    timeout = found.inside._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    return digest(y), found.islands.members, dist.get_process_group_ranks(found.inside), timeout


def test_groups_of_one_job_have_sub_groups_of_their_own():
    results = run_ranks(two_jobs_groups, 8)
    for first, islands in ((0, [[0, 1], [2, 3]]), (4, [[0, 3], [1, 2]])):
        tensors = [tensor(0, rank, (9, 40), FP32) for rank in range(first, first + 4)]
        expected = digest(expected_hierarchical(tensors, parse_codec("mxfp4"), islands))
        for rank in range(first, first + 4):
            found, members, inside, timeout = results[rank]
            assert found == expected and [*map(list, members)] == islands
            assert inside == [first + r for r in next(i for i in islands if rank - first in i)]
            assert timeout == 97, "the group's own"


def nan_in_one_island(rank, ranks):
    group = dist.group.WORLD
    found = topology.connect({group: Islands.of_size(4, 2)})[group]
    x = tensor(0, rank, (3, 300), BF16)
    if rank == 1:
        x[1, 130] = torch.inf
    if rank == 3:
        x[1, 130] = -torch.inf
    return [all_reduce(x, codec, group, "hierarchical", topology=found) for codec in oracles.PRESETS]


def test_infinity_on_one_rank_is_nan_in_its_block_on_all():
    results = run_ranks(nan_in_one_island, 4)
    for name, *sums in zip(oracles.PRESETS, *results, strict=True):
        assert len(set(map(digest, sums))) == 1
        block = parse_codec(name).format.block
        expected = torch.zeros(3, 300, dtype=torch.bool)
        expected[1, 130 // block * block : (130 // block + 1) * block] = True
        assert torch.equal(sums[0].isnan(), expected), name


def mistakes(rank, ranks):
    said = []
    for islands in (Islands.of_size(4, 2), Islands.of_size(6, 6) if rank else Islands.of_size(2, 1)):
        try:
            topology.connect({None: islands})
        except ValueError as error:
            said.append(str(error))
    return said


def test_islands_of_another_group():
    assert run_ranks(mistakes, 2)[0] == [
        "islands [[0, 1], [2, 3]] are of 4 ranks, the group is of 2",
        "rank 1: islands [[0, 1, 2, 3, 4, 5]] are of 6 ranks, the group is of 2",
    ]


def test_a_chunk_is_decoded_while_the_next_ones_are_between_machines():
    done = []

    def steps(number):
        for name, where in (("raw", None), ("across", None), ("inside", NEAR)):
            done.append(f"{name} {number}")
            yield where
        done.append(f"decode {number}")

    pending = PendingSum(torch.empty(0))
    for number in range(3):
        pending.start(steps(number))
    pending.wait()
    assert done[:6] == ["raw 0", "raw 1", "raw 2", "across 0", "across 1", "across 2"]
    assert done[6:] == ["inside 0", "inside 1", "decode 0", "inside 2", "decode 1", "decode 2"]
