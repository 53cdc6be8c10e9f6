"""The fixed reduction tree: whoever holds the units, the additions are the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.core import tree

UNITS = st.integers(1, 70)


def expression(node: int, n: int) -> str:
    """The sum that `node` stands for, by the definition: pairs are added, an odd one moves up."""
    level, index = node >> 12, node & 0xFFF
    row = [str(unit) for unit in range(n)]
    for _ in range(level):
        pairs = [f"({a}+{b})" for a, b in zip(row[::2], row[1::2], strict=False)]
        row = pairs + row[-1:] * (len(row) % 2)
    return row[index]


def climb(values: dict[int, str], n: int) -> dict[int, str]:
    """Carry out the additions that `values` allow."""
    values = dict(values)
    for left, right, result in tree.plan_additions(values, n):
        assert result not in values
        values[result] = f"({values[left]}+{values[right]})"
    return values


def test_the_numbers_are_those_of_the_wire() -> None:
    """A node is level * 4096 + index; five units have four levels, the fifth moves up twice."""
    assert tree.levels(1) == 1
    assert tree.root(1) == 0
    assert tree.levels(5) == 4
    assert tree.root(5) == 3 << 12
    assert tree.children(3 << 12, 5) == (2 << 12, 4)
    assert tree.children(2 << 12, 5) == (1 << 12, 1 << 12 | 1)
    assert tree.children(1 << 12 | 1, 5) == (2, 3)
    assert tree.children(2 << 12 | 1, 5) == (4,)
    assert tree.children(4, 5) == ()
    assert tree.plan_additions(range(5), 5) == [
        (0, 1, 1 << 12),
        (2, 3, 1 << 12 | 1),
        (1 << 12, 1 << 12 | 1, 2 << 12),
        (2 << 12, 4, 3 << 12),
    ]


def test_a_run_of_units_is_covered_by_its_whole_subtrees() -> None:
    """Units 1 to 6 of 8 are four subtrees; units that move up keep their lowest name."""
    assert tree.cover(range(1, 7), 8) == (1, 1 << 12 | 1, 1 << 12 | 2, 6)
    assert tree.cover([4], 5) == (4,)
    assert tree.cover([3, 4], 5) == (3, 4)
    assert tree.cover([4, 5, 6], 7) == (2 << 12 | 1,)
    assert tree.cover([], 7) == ()


def test_other_names_of_a_node_that_moved_up_are_understood() -> None:
    """Additions take node 4 of five units by any of its names."""
    assert tree.plan_additions([2 << 12, 2 << 12 | 1], 5) == [(2 << 12, 4, 3 << 12)]


@pytest.mark.parametrize("node", [-1, 5, 1 << 12 | 3, 4 << 12, 1 << 20])
def test_a_node_that_is_not_there_is_refused(node: int) -> None:
    """A number outside the tree is a `ValueError`, wherever it is used."""
    with pytest.raises(ValueError, match="units"):
        tree.children(node, 5)
    with pytest.raises(ValueError, match="units"):
        tree.plan_additions([node], 5)
    with pytest.raises(ValueError, match="units"):
        tree.cover([node], 5)


def test_a_tree_has_as_many_units_as_numbers_allow() -> None:
    """No units, or more than 12 bits can name, are refused; 4,096 are not."""
    assert tree.root(4096) == 12 << 12
    for n in (0, 4097):
        with pytest.raises(ValueError, match="1 to 4096"):
            tree.levels(n)


@given(UNITS)
def test_the_root_is_the_sum_by_definition(n: int) -> None:
    """All units add up to the expression that the definition gives, in one addition less."""
    values = climb({unit: str(unit) for unit in range(n)}, n)
    assert values[tree.root(n)] == expression(tree.root(n), n)
    assert len(values) == 2 * n - 1


@given(st.data(), UNITS)
def test_any_partition_gives_the_same_expression(data: st.DataObject, n: int) -> None:
    """Nodes that add what they own and exchange subtree sums all get the one expression."""
    owners = data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))
    sums: dict[int, str] = {}
    for owner in set(owners):
        own = {unit: str(unit) for unit in range(n) if owners[unit] == owner}
        values = climb(own, n)
        sums |= {node: values[node] for node in tree.cover(own, n)}
    assert all(value == expression(node, n) for node, value in sums.items())
    assert climb(sums, n)[tree.root(n)] == expression(tree.root(n), n)


@given(st.data(), UNITS)
def test_a_cover_is_complete_disjoint_ordered_and_maximal(data: st.DataObject, n: int) -> None:
    """The subtrees of a cover hold exactly the owned units, in order, and no two can be added."""
    owned = data.draw(st.sets(st.integers(0, n - 1)))
    cover = tree.cover(owned, n)

    def units(node: int) -> list[int]:
        below = tree.children(node, n)
        return [unit for child in below for unit in units(child)] if below else [node]

    assert sorted(unit for node in cover for unit in units(node)) == sorted(owned)
    assert list(map(tree.first_unit, cover)) == sorted(map(tree.first_unit, cover))
    assert all(len(tree.children(node, n)) != 1 for node in cover)
    assert tree.plan_additions(cover, n) == []


@given(st.data(), UNITS)
def test_the_subtrees_of_a_run_are_counted_without_listing_them(
    data: st.DataObject, n: int
) -> None:
    """`count_of_run` is the length of the run's cover, and at most 2 log2 n (at least 1)."""
    start = data.draw(st.integers(0, n))
    end = data.draw(st.integers(start, n))
    count = tree.count_of_run(start, end, n)
    assert count == len(tree.cover(range(start, end), n))
    assert count <= max(1, 2 * (tree.levels(n) - 1))
