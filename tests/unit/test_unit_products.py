"""Products of several units in floating point: added up as far as the tree allows, or apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from p2pinfer.core import tree
from p2pinfer.model import kernels, zendnn
from p2pinfer.model.linear import pack, padded_rows
from p2pinfer.model.reduction import subtree_sums
from p2pinfer.model.rope import Angles
from p2pinfer.model.unit_products import FEW_ROWS, FloatPacker, Heads, Norm, Units

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


LIBRARIES = ("onednn", "zendnn")
IN_TURNS = (1, 1, 3, 1, FEW_ROWS, 4, 4, 1, 5, 5, 70, 1)
"""Numbers of rows, as steps come."""


@pytest.fixture(params=LIBRARIES)
def _library(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each library that can multiply here, in use."""
    if request.param == "zendnn" and zendnn.missing():
        pytest.skip(f"ZenDNN cannot multiply here: {zendnn.missing()}")
    kernels.use(request.param)
    yield
    kernels.use("auto")


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(32, 32, 32, 32), (48, 32, 32, 16)], ids=str)
def test_gated_units_are_of_the_last_call_in_whatever_order_numbers_of_rows_come(
    widths: tuple[int, ...], dtype: torch.dtype
) -> None:
    """A row's bits are those that it has among many rows; nothing of another call is left."""
    torch.manual_seed(len(widths))
    own = tuple(range(len(widths)))
    gate_up = pack(torch.randn(2 * sum(widths), HIDDEN, dtype=dtype))
    norm = Norm(torch.ones(HIDDEN), 1e-5)
    products = packer(dtype).gated(Units(own), gate_up, linears(widths, dtype), widths, norm)
    x = torch.randn(70, HIDDEN, dtype=dtype)
    whole = {unit: part.clone() for unit, part in products(x, 70, set(own)).items()}
    for rows in IN_TURNS:
        some = products(x[: padded_rows(rows)].contiguous(), rows, set(own))
        assert same(some, {unit: part[:rows] for unit, part in whole.items()}), rows


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [Heads(3, 2, 8), Heads(1, 1, 16), Heads(2, 4, 64)], ids=str)
def test_heads_are_turned_the_same_in_whatever_order_numbers_of_rows_come(
    heads: Heads, dtype: torch.dtype
) -> None:
    """As the paper says, by the angles of the call, with the bits that a row has among many."""
    torch.manual_seed(heads.units)
    units, group, dim = heads
    width = units * (group + 2) * dim
    product = pack(torch.randn(width, HIDDEN, dtype=dtype), torch.randn(width, dtype=dtype))
    norm = Norm(torch.ones(HIDDEN), 1e-5)
    projection = packer(dtype).projection(product, heads, norm)
    x, turn = torch.randn(70, HIDDEN, dtype=dtype), torch.rand(70, dim // 2)

    def angles(rows: int) -> Angles:
        return Angles(turn[:rows].cos(), turn[:rows].sin())

    whole = [part.clone() for part in projection(x, angles(70))]
    for rows in IN_TURNS:
        parts = projection(x[: padded_rows(rows)].contiguous(), angles(rows))
        for part, of_all in zip(parts, whole, strict=True):
            assert torch.equal(part, of_all[:, :rows]), rows
    q, k, v = product(x).split((units * group * dim, units * dim, units * dim), dim=1)
    for part, straight in ((whole[0], q.view(70, units, group, dim)), (whole[1], k)):
        one, other = straight.float().view(70, units, -1, dim).chunk(2, dim=-1)
        cos, sin = (each[:, None, None] for each in (turn.cos(), turn.sin()))
        turned = torch.cat((one * cos - other * sin, other * cos + one * sin), dim=-1)
        assert torch.allclose(part.reshape(units, 70, -1), turned.transpose(0, 1).flatten(2))
    assert torch.equal(whole[2], v.view(70, units, dim).transpose(0, 1))
