"""The fixed reduction tree: in which order the partial sums of a half layer's units are added.

Floating-point addition is not associative, so every node adds along one tree, a function of the
number of units alone: at each level nodes 2i and 2i+1 are added, left operand first, and an odd
last one moves up unchanged. A node that owns a whole subtree sends its one sum.

A tree node's number is `level << 12 | index`; level 0 are the units. One that moved up is the same
value as its only child and is called by the lowest of its names (its *canonical* name).
"""

from __future__ import annotations

from collections.abc import Iterable

INDEX_BITS = 12
INDEX_MASK = (1 << INDEX_BITS) - 1


def levels(n: int) -> int:
    """Levels of the tree over `n` units, that of the units included.

    Raises `ValueError` when a node number could not name so many units.
    """
    if not 1 <= n <= 1 << INDEX_BITS:
        raise ValueError(f"a tree has 1 to {1 << INDEX_BITS} units, not {n}")
    return (n - 1).bit_length() + 1


def root(n: int) -> int:
    """The node that is the sum of all `n` units."""
    return (levels(n) - 1) << INDEX_BITS


def children(node: int, n: int) -> tuple[int, ...]:
    """Canonical names of what `node` is the sum of: two nodes, one that moved up, or () for a unit.

    Raises `ValueError` when the tree over `n` units has no such node.
    """
    level, index = _place(node, n)
    if level == 0:
        return ()
    below = _breadth(level - 1, n)
    return tuple(
        _canonical(level - 1, child, n) for child in (2 * index, 2 * index + 1) if child < below
    )


def cover(owned: Iterable[int], n: int) -> tuple[int, ...]:
    """The maximal complete subtrees all of whose units are `owned`, or in subtrees that are,
    ascending by first unit. Raises `ValueError` on an unknown node.
    """
    have = {_canonical(*_place(node, n), n) for node in owned}
    additions = plan_additions(have, n)
    used = {node for left, right, _ in additions for node in (left, right)}
    tops = (have | {result for _, _, result in additions}) - used
    return tuple(sorted(tops, key=first_unit))


def plan_additions(nodes: Iterable[int], n: int) -> list[tuple[int, int, int]]:
    """The additions (left, right, result), in order, that bring `nodes` as far up as they go.

    For nodes that together cover all units the last result is `root(n)`. Each sum is made of the
    same two operands in the same order whatever the nodes. Raises `ValueError` on an unknown node.
    """
    have = {_canonical(*_place(node, n), n) for node in nodes}
    additions = []
    for level in range(1, levels(n)):
        for index in range(_breadth(level - 1, n) // 2):
            left = _canonical(level - 1, 2 * index, n)
            right = _canonical(level - 1, 2 * index + 1, n)
            result = level << INDEX_BITS | index
            if left in have and right in have and result not in have:
                have.add(result)
                additions.append((left, right, result))
    return additions


def count_of_run(start: int, end: int, n: int) -> int:
    """How many subtrees cover the run of units `[start, end)`, without listing them."""
    count = 0
    while start < end:
        size = start & -start or 1 << levels(n)
        while min(start + size, n) > end:
            size >>= 1
        start += size
        count += 1
    return count


def first_unit(node: int) -> int:
    """The lowest unit of the subtree of `node`."""
    return (node & INDEX_MASK) << (node >> INDEX_BITS)


def _breadth(level: int, n: int) -> int:
    """Nodes of one level: n / 2**level, rounded up."""
    return (n - 1 >> level) + 1


def _place(node: int, n: int) -> tuple[int, int]:
    level, index = node >> INDEX_BITS, node & INDEX_MASK
    if not 0 <= level < levels(n) or index >= _breadth(level, n):
        raise ValueError(f"the tree over {n} units has no node {node:#06x}")
    return level, index


def _canonical(level: int, index: int, n: int) -> int:
    """The lowest name: an only child is always 2 * index, with nothing at 2 * index + 1."""
    while level and 2 * index + 1 >= _breadth(level - 1, n):
        level, index = level - 1, 2 * index
    return level << INDEX_BITS | index
