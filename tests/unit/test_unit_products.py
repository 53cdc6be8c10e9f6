"""Products of several units in floating point: added up as far as the tree allows, or apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from p2pinfer.core import tree
from p2pinfer.model.linear import pack, padded_rows
from p2pinfer.model.reduction import subtree_sums
from p2pinfer.model.unit_products import FEW_ROWS, FloatPacker, Norm, Units

HIDDEN, WIDTH = 64, 32
DTYPES = (torch.float32, torch.bfloat16)
OF = 8, 7, 5, 1
"""How many units there are in all."""
OWN = [
    (of, own)
    for of in OF
    for own in (tuple(range(of)), (0, 1, 2), (2, 3), (1, 2, 4), (4, 5, 6), (3,))
    if max(own) < of
]


def packer(dtype: torch.dtype) -> FloatPacker:
    """One that is only given weights that are packed already."""
    weights: Any = None
    return FloatPacker(weights, torch.device("cpu"), dtype)


def linears(widths: Sequence[int], dtype: torch.dtype) -> list[Any]:
    """A weight for each unit, [HIDDEN, its width]."""
    return [pack(torch.randn(HIDDEN, width, dtype=dtype)) for width in widths]


def same(left: dict[int, Tensor], right: dict[int, Tensor]) -> bool:
    """The same nodes with the same bits."""
    assert left.keys() == right.keys()
    return all(each.dtype is torch.float32 for each in left.values()) and all(
        torch.equal(left[node], right[node]) for node in left
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("of", "own"), OWN, ids=str)
@pytest.mark.parametrize("rows", [1, 4, FEW_ROWS, 70])
def test_units_with_inputs_of_their_own_are_added_as_by_the_tree(
    of: int, own: tuple[int, ...], rows: int, dtype: torch.dtype
) -> None:
    """The sums have the bits that adding one by one has; who wants some units, or has many rows,
    gets them apart."""
    torch.manual_seed(of)
    units = Units(own, tuple(tree.plan_additions(own, of)))
    weights = linears([WIDTH] * len(own), dtype)
    x = torch.randn(len(own), padded_rows(rows), WIDTH, dtype=dtype)
    together = packer(dtype).separate(units, weights)
    apart = {
        unit: weight(each)[:rows].float()
        for unit, weight, each in zip(own, weights, x, strict=True)
    }
    assert same(together(x, rows, set(own)), subtree_sums(apart, of) if rows <= FEW_ROWS else apart)
    some = set(own[1:])
    assert same(together(x, rows, some), {unit: apart[unit] for unit in some})
    assert same(packer(dtype).separate(Units(own), weights)(x, rows, set(own)), apart)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(32, 32, 32, 32), (48, 32, 32, 16)], ids=str)
@pytest.mark.parametrize("rows", [1, 4, FEW_ROWS, 70])
def test_gated_units_are_added_as_by_the_tree(
    widths: tuple[int, ...], rows: int, dtype: torch.dtype
) -> None:
    """Of units that are all as wide, and of those that are not."""
    torch.manual_seed(rows)
    own, of = (2, 3, 4, 5), 8
    units = Units(own, tuple(tree.plan_additions(own, of)))
    gate_up = pack(torch.randn(2 * sum(widths), HIDDEN, dtype=dtype))
    down = linears(widths, dtype)
    x = torch.randn(padded_rows(rows), HIDDEN, dtype=dtype)
    norm = Norm(torch.ones(HIDDEN), 1e-5)
    together = packer(dtype).gated(units, gate_up, down, widths, norm)
    gate, up = gate_up(x)[:rows].chunk(2, dim=1)
    active = torch.split(torch.nn.functional.silu(gate) * up, widths, dim=1)
    apart = {
        unit: weight(each.contiguous()).float()
        for unit, weight, each in zip(own, down, active, strict=True)
    }
    assert same(together(x, rows, set(own)), subtree_sums(apart, of) if rows <= FEW_ROWS else apart)
    assert same(together(x, rows, {3}), {3: apart[3]})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_of_the_last_call_in_whatever_order_numbers_of_rows_come(
    dtype: torch.dtype,
) -> None:
    """The memory of sums is kept for some of them, and nothing of another call is left in it."""
    own, of = tuple(range(8)), 8
    weights = linears([WIDTH] * len(own), dtype)
    units = Units(own, tuple(tree.plan_additions(own, of)))
    together = packer(dtype).separate(units, weights)
    for rows in (1, 1, 3, 1, FEW_ROWS, 4, 4, 1, 5, 5):
        x = torch.randn(len(own), padded_rows(rows), WIDTH, dtype=dtype)
        products = zip(own, weights, x, strict=True)
        apart = {unit: weight(each)[:rows].float() for unit, weight, each in products}
        assert same(together(x, rows, set(own)), subtree_sums(apart, of))
