"""What `p2pinfer plan` prints: who holds what, and who would if a member were gone."""

from __future__ import annotations

import json

import msgspec
import pytest

from p2pinfer.core.preview import fits_without, plan_object, preview
from p2pinfer.core.quorum import tolerates
from p2pinfer.errors import ClusterError
from p2pinfer.types import Plan
from tests.plan_series import HEAD_BYTES, MLP_BYTES, VOCAB_BYTES, after, member, nodes

KV = 4 * 2 * 16 * 4
"""Bytes of the KV of one head unit and position, over all layers."""


def voting(plan: Plan) -> Plan:
    """The same plan with all its members as voters."""
    return msgspec.structs.replace(plan, voters=tuple(range(len(plan.members))))


def test_a_plan_is_told_in_plain_values() -> None:
    """Fence, leader, voters, and for each member what it holds, offers and has left, as JSON."""
    offer = 8 * HEAD_BYTES + 8 * MLP_BYTES + 32 * VOCAB_BYTES
    members = [member(0, memory_bytes=offer), member(1), member(2, witness=True)]
    told = plan_object(after(None, members, replicas=1))
    assert json.loads(json.dumps(told)) == told
    assert (told["term"], told["epoch"], told["layout"], told["model"]) == (1, 1, "heads", "m")
    assert (told["leader"], told["voters"], told["quorum"]) == ("node00", ["node00"], "majority")
    first, second, third = told["members"]
    weights = 4 * (HEAD_BYTES - 16 * KV) + 4 * MLP_BYTES + 16 * VOCAB_BYTES
    assert first["owned"] == [
        {
            "span": [0, 4],
            "head_units": [0, 1, 2, 3],
            "mlp_units": [0, 1, 2, 3],
            "vocab_units": list(range(16)),
        }
    ]
    assert first["standby"][0]["head_units"] == [4, 5, 6, 7]
    assert (first["weight_bytes"], first["standby_bytes"]) == (weights, weights)
    assert (first["memory_bytes"], first["kv_room_bytes"]) == (offer, offer - 2 * weights)
    assert (second["memory_bytes"], second["kv_room_bytes"], second["voter"]) == (None, None, False)
    assert (third["owned"], third["standby"], third["witness"]) == ([], [], True)
    assert told["kv_positions"] == (offer - 2 * weights) // (8 * KV)
    assert told["exact"] is True


def test_owners_of_two_classes_are_not_exact() -> None:
    """Where owners compute in different numeric classes a reply may depend on the plan."""
    plan = after(None, [member(0, numeric_class="x"), member(1, numeric_class="y")])
    assert plan_object(plan)["exact"] is False


def test_a_preview_tells_who_would_take_over() -> None:
    """Without a follower the others hold its units, the standbys first; nothing else moves."""
    plan = voting(after(None, nodes(3), replicas=1))
    told = preview(plan, nodes(3), "node02")
    assert json.loads(json.dumps(told)) == told
    assert (told["without"], told["survives"], told["fits"], told["quorum"], told["why"]) == (
        "node02",
        True,
        True,
        True,
        "",
    )
    mine = plan_object(plan)["members"][2]["owned"][0]
    assert told["moved"] == {
        "head": mine["head_units"],
        "mlp": mine["mlp_units"],
        "vocab": mine["vocab_units"],
    }
    assert told["exact"] is True
    assert [m["name"] for m in told["plan"]["members"]] == ["node00", "node01"]
    assert (told["plan"]["term"], told["plan"]["epoch"]) == (1, 2)


def test_a_preview_without_the_leader_has_another() -> None:
    """A voter that is no witness would lead, in a later term."""
    members = [*nodes(2), member(2, witness=True)]
    plan = voting(after(None, members))
    told = preview(plan, members, "node00")
    assert told["survives"]
    assert (told["plan"]["leader"], told["plan"]["term"]) == ("node01", 2)


def test_a_preview_says_which_voters_would_be_left() -> None:
    """Two voters cannot go on without their leader: one of two is no majority."""
    plan = voting(after(None, nodes(2)))
    told = preview(plan, nodes(2), "node00")
    assert (told["survives"], told["fits"], told["quorum"]) == (False, True, False)
    assert told["why"] == "of 2 voters 1 would be left: node01"
    assert preview(plan, nodes(2), "node01")["survives"]


def test_a_preview_says_what_does_not_fit() -> None:
    """Too little memory, or nobody at all: the reason is told, and there is no plan."""
    offer = 5 * HEAD_BYTES + 5 * MLP_BYTES + 20 * VOCAB_BYTES
    members = nodes(2, memory_bytes=offer)
    told = preview(voting(after(None, members)), members, "node01")
    assert (told["survives"], told["fits"], told["quorum"]) == (False, False, True)
    assert "does not fit" in told["why"]
    assert (told["plan"], told["moved"], told["exact"]) == (None, None, None)
    told = preview(after(None, nodes(1)), nodes(1), "node00")
    assert "nobody would be left" in told["why"]
    assert "of 1 voters 0 would be left: none" in told["why"]


def test_a_preview_knows_members_that_are_in_no_plan_yet() -> None:
    """The death of a newcomer costs nothing; one whose worker runs could take units."""
    plan = voting(after(None, nodes(2)))
    waiting = member(5)
    ready = member(6, numeric_class="x")
    told = preview(plan, [*nodes(2), waiting], "node05")
    assert told["survives"]
    assert told["moved"] == {"head": [], "mlp": [], "vocab": []}
    held = preview(plan, [*nodes(2), waiting, ready], "node01")["plan"]["members"]
    assert [bool(m["owned"]) for m in held] == [True, False, True]


def test_a_preview_tells_whether_bits_stay() -> None:
    """Units that would go to another numeric class are not exact."""
    members = [member(0, numeric_class="x"), member(1, numeric_class="y")]
    told = preview(voting(after(None, members)), members, "node01")
    assert told["exact"] is False


def test_a_preview_of_nobody_names_those_who_are_there() -> None:
    """A name that no living member has is an error."""
    with pytest.raises(ClusterError, match="no member is called x; there are: node00, node01"):
        preview(after(None, nodes(2)), nodes(2), "x")


def test_status_tells_whose_death_the_memory_allows() -> None:
    """A death is survived only where the others can hold the model."""
    unit = HEAD_BYTES + MLP_BYTES + 4 * VOCAB_BYTES
    for units, survivors in ((3, ()), (4, ("node00", "node01", "node02"))):
        members = nodes(3, memory_bytes=units * unit)
        plan = voting(after(None, members))
        ids = frozenset(m.node_id for m in members)
        assert tolerates(plan, ids, lambda i, p=plan, m=members: fits_without(p, m, i)) == survivors
