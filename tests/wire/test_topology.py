# SPDX-License-Identifier: Apache-2.0
"""Islands: which ranks are near one another, from names, numbers and lists."""

import pytest

from megatron_comp.wire.topology import Islands


def test_ranks_with_one_name_share_an_island():
    assert Islands.of_names(["b", "a", "b", "a", "c"]).members == ((0, 2), (1, 3), (4,))


def test_islands_of_one_size():
    assert Islands.of_size(6, 2).members == ((0, 1), (2, 3), (4, 5))
    assert Islands.of_size(4, 4).members == ((0, 1, 2, 3),)
    for size in (0, -1, 4, 7):
        with pytest.raises(ValueError, match=f"islands of {size} ranks do not divide 6 ranks"):
            Islands.of_size(6, size)


def test_lists_are_put_in_order():
    assert Islands(((4, 2), (1, 0), (3,))).members == ((0, 1), (2, 4), (3,))


@pytest.mark.parametrize("members", [((0, 1), (1, 2)), ((0, 1), (3,)), ((0,), ()), (), ((-1, 0), (1,))])
def test_what_are_no_islands(members):
    with pytest.raises(ValueError, match="do not hold each of ranks 0 to .* once"):
        Islands(members)


@pytest.mark.parametrize(
    "names, shares, two_levels, equal",
    [
        ("aabb", 2, True, True),
        ("aabbb", 2, True, False),
        ("abbb", 1, True, False),
        ("aabbcc", 2, True, True),
        ("abcd", 1, False, True),
        ("aaaa", 4, False, True),
        ("a", 1, False, True),
    ],
)
def test_levels_and_shares(names, shares, two_levels, equal):
    islands = Islands.of_names(names)
    assert (islands.ranks, islands.shares, islands.have_two_levels, islands.are_equal) == (
        len(names),
        shares,
        two_levels,
        equal,
    )


def test_places():
    islands = Islands.of_names("abbab")
    assert [islands.find(rank) for rank in range(5)] == [(0, 0), (1, 0), (1, 1), (0, 1), (1, 2)]
    assert islands.across(1) == (3, 2)
