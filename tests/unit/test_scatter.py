"""Who adds which rows of a long sum, and what a plan lets members send of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.core import tree
from p2pinfer.core.scatter import SCATTER_MEMBERS, SCATTER_ROWS, shares
from p2pinfer.core.step_checks import check_frame
from p2pinfer.core.topology import topology
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.limits import MAX_NODES, MAX_STEP_TOKENS
from p2pinfer.types import Fence
from p2pinfer.wire.messages import Partial
from p2pinfer.wire.tensors import Tensor, WireDType
from tests.model_specs import SIX_LAYERS
from tests.step_plans import plan_of


@given(
    members=st.sets(st.integers(0, MAX_NODES - 1), min_size=1),
    rows=st.integers(1, MAX_STEP_TOKENS),
)
def test_every_row_is_added_by_one_member(members: set[int], rows: int) -> None:
    """Or all rows by every member; no share is empty."""
    found = shares(members, rows)
    if len(members) < SCATTER_MEMBERS or rows < SCATTER_ROWS:
        assert found == {}
    else:
        assert set(found) == members
        assert [row for each in found.values() for row in range(*each)] == list(range(rows))
        sizes = {each.end - each.start for each in found.values()}
        assert min(sizes) > 0
        assert max(sizes) - min(sizes) <= 1


def test_members_agree_on_who_adds_what() -> None:
    """Each works it out for itself from the plan."""
    plan = plan_of(3)
    seen = [topology(plan, me) for me in range(3)]
    for half in (0, 1):
        found = [mine.shares(mine.roles[0], half, SCATTER_ROWS) for mine in seen]
        assert found[0] == found[1] == found[2] != {}


def test_what_one_member_owns_is_added_by_nobody() -> None:
    """Its own sum is the whole one."""
    mine = topology(plan_of(3, "layers"), 0)
    role = mine.roles[0]
    assert len(role.parts[0]) == 1
    assert mine.shares(role, 0, SCATTER_ROWS) == {}
    assert not mine.is_whole(role.holding.stage, 0, role.parts[0][0])
    assert not mine.is_whole(role.holding.stage + 1, 0, role.parts[0][0])


def whole(**changes: Any) -> Partial:
    """A share that member 1 has added."""
    root = tree.root(topology(plan_of(3), 0).units[0])
    size = SIX_LAYERS.hidden_size
    fields: dict[str, Any] = {
        "fence": Fence(1, 1),
        "step": 1,
        "link_seq": 0,
        "sender": 1,
        "stage": 0,
        "layer": 0,
        "half": 0,
        "parts": (root,),
        "tensor": Tensor(WireDType.FLOAT32, (1, 3, size), bytes(12 * size)),
    }
    return Partial(**(fields | changes))


def test_a_member_may_send_the_share_that_it_has_added() -> None:
    """And nothing else that is not its own sum."""
    mine = topology(plan_of(3), 0)
    check_frame(mine, 1, whole())
    root = whole().parts[0]
    for parts in ((root + 1,), (0, root), (3,)):
        with pytest.raises(RemoteProtocolError):
            check_frame(mine, 1, whole(parts=parts))
