"""Sums of unit partials along the fixed tree of `core/tree.py`, in float32 or bfloat16.

The additions, and so the bits, are the same however the units lie on nodes: a node adds what its
own units allow, sends those subtree sums, and every node adds what it received the rest of the way.
All of the tree is in one format, `ModelSpec.wire_dtype`. In bfloat16 each unit's partial is rounded
before anything is added to it, and each sum as it is made, whether or not it is sent: so what
crosses the wire loses nothing there, and the plan still does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

from torch import Tensor

from p2pinfer.core import tree


@lru_cache(maxsize=4096)
def _additions(nodes: tuple[int, ...], units: int) -> tuple[tuple[int, int, int], ...]:
    return tuple(tree.plan_additions(nodes, units))


@lru_cache(maxsize=4096)
def _cover(owned: tuple[int, ...], units: int) -> tuple[int, ...]:
    return tree.cover(owned, units)


def subtree_sums(partials: Mapping[int, Tensor], units: int) -> dict[int, Tensor]:
    """Add one node's partials (by tree node, each [rows, hidden]) as far as they go.

    Returns the sums of the maximal complete subtrees, by tree node, in ascending order.
    """
    return _climb(dict(partials), units, _cover(tuple(partials), units))


def whole_sum(parts: Mapping[int, Tensor], units: int) -> Tensor:
    """Add subtree sums that cover all `units` up to the root: [rows, hidden]."""
    root = tree.root(units)
    if root in parts:
        return parts[root]
    return _climb(dict(parts), units, (root,))[root]


def _climb(values: dict[int, Tensor], units: int, wanted: Iterable[int]) -> dict[int, Tensor]:
    for left, right, result in _additions(tuple(values), units):
        values[result] = values[left] + values[right]
    return {node: values[node] for node in wanted}
