"""Who owns units, and in which layout: what is predicted to be fastest, with care."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from p2pinfer.core.choice import (
    FAST_ENOUGH,
    FEWER_GAIN,
    Choice,
    Chooser,
    Question,
    charter,
    choose,
    faster,
    owner_ids,
    prediction_object,
    subsets,
)
from p2pinfer.core.events import NodeConfig
from p2pinfer.core.planner import make_plan
from p2pinfer.core.prediction import Prediction
from p2pinfer.types import Fence, Member, Plan
from tests.unit.test_prediction import MODEL, apart, node


def question(*members: Member, **changes: Any) -> Question:
    """All may be left out and any layout be chosen, unless said otherwise."""
    asked = Question(members, members[0], MODEL, 1, "auto", True, "auto", frozenset())
    return asked._replace(**changes)


def plan_of(*members: Member, layout: str = "heads", **changes: Any) -> Plan:
    """The plan of all of them."""
    plan = make_plan(
        members=members,
        model=MODEL,
        layout=layout,
        fence=Fence(1, 1),
        cluster_id="0" * 16,
        leader_id=members[0].node_id,
    )
    return replace(plan, **changes)


def config(**changes: Any) -> NodeConfig:
    """A node's settings, as `node start` has them by default."""
    values = {"layout": "auto", "use_nodes": "auto", **changes}
    return NodeConfig(member=node(0), model=MODEL, cluster_id="0" * 16, **values)


def chosen(asked: Question) -> Choice:
    """The choice, which must be made."""
    found = choose(asked)
    assert found is not None
    return found


def names(choice: Choice) -> list[int]:
    """Numbers of the owners."""
    return sorted(int(node_id, 16) for node_id in choice.owners)


def test_equal_and_near_nodes_all_work() -> None:
    """Four machines side by side share heads, and nobody is spared."""
    found = chosen(question(*apart(*(node(i) for i in range(4)))))
    assert (found.layout, names(found), found.spare) == ("heads", [0, 1, 2, 3], frozenset())


def test_far_nodes_are_left_out() -> None:
    """Where each exchange takes 10 ms, one node is faster than two, and keeps the others' place."""
    members = apart(node(0), node(1), node(2), ms=20.0)
    found = chosen(question(*members, layout="heads", layout_auto=False))
    assert (names(found), len(found.spare)) == ([0], 2)
    assert names(chosen(question(*members, layout_auto=False, use_nodes="all"))) == [0, 1, 2]


def test_who_shares_more_than_it_can_is_left_out() -> None:
    """A node whose told weight is far above its speed makes all wait."""
    members = [node(0, weight=1.0), node(1, weight=1.0), node(2, 2.0, weight=1.0)]
    found = chosen(question(*members))
    assert (found.layout, names(found)) == ("heads", [0, 1])


def test_nobody_is_left_out_for_a_little() -> None:
    """Below `FEWER_GAIN` all stay; who is out already stays out for less."""
    members = [node(0, weight=1.0), node(1, weight=1.0), node(2, 9.4, weight=1.0)]
    pair = frozenset(m.node_id for m in members[:2])
    everyone = chosen(question(*members, use_nodes="all"))
    fewer = chosen(question(*members[:2]))
    assert 1.05 < fewer.tokens_per_s / everyone.tokens_per_s < FEWER_GAIN
    assert names(chosen(question(*members))) == [0, 1, 2]
    assert names(chosen(question(*members, present=pair))) == [0, 1]


def test_a_cluster_that_is_fast_enough_stays_as_it_is() -> None:
    """A small model gains nothing that anybody sees, and would lose its replicas' places."""
    members = [replace(m, product_gb_s=2000.0, read_gb_s=0.0) for m in (node(0), node(1))]
    small = replace(MODEL, num_layers=4)
    assert chosen(question(members[0], model=small)).tokens_per_s > FEWER_GAIN * FAST_ENOUGH
    found = chosen(question(*members, model=small))
    assert found.tokens_per_s > FAST_ENOUGH
    assert names(found) == [0, 1]


def test_far_nodes_work_by_layers_where_they_must_work() -> None:
    """Where no layout was asked for and all are to work, distance chooses layers."""
    members = apart(node(0), node(1), ms=40.0)
    assert chosen(question(*members, use_nodes="all")).layout == "layers"
    assert chosen(question(*members, use_nodes="all", layout_auto=False)).layout == "heads"


def test_pairs_of_near_nodes_are_stages() -> None:
    """Two rooms, far from each other, with two nodes each that are near: 2x2."""
    rooms = [node(i, 5.0, machine="b" * 16 if i > 1 else "a" * 16) for i in range(4)]
    far = apart(*rooms, ms=40.0)
    members = [replace(m, machine=room.machine) for m, room in zip(far, rooms, strict=True)]
    assert chosen(question(*members, use_nodes="all")).layout == "2x2"


def test_another_layout_must_be_much_better_once_all_work() -> None:
    """What everybody has loaded is not moved for a tenth."""
    members = apart(node(0), node(1), ms=6.2)
    heads, layers = (
        chosen(question(*members, use_nodes="all", layout=which, layout_auto=False)).tokens_per_s
        for which in ("heads", "layers")
    )
    assert 1.1 < layers / heads < 1.25
    asked = question(*members, use_nodes="all")
    assert chosen(asked).layout == "layers"
    present = frozenset(m.node_id for m in members)
    assert chosen(asked._replace(present=present)).layout == "heads"


def test_nothing_is_chosen_where_anything_is_unknown() -> None:
    """A node without a measurement, or a layout that has no place: all as it is."""
    assert choose(question(node(0), node(1, 0.0))) is None
    assert choose(question(node(0), node(1), layout="3x1", layout_auto=False)) is None
    assert choose(question(node(0, machine=""), node(1, machine=""))) is None


def test_memory_and_replicas_come_first() -> None:
    """Who is needed to hold the model, or its replicas, is not left out, however slow."""
    slow = node(1, 1.0, weight=1.0)
    assert names(chosen(question(node(0, weight=1.0), slow, replicas=0))) == [0]
    tight = replace(node(0, weight=1.0), memory_bytes=2 << 30)
    assert names(chosen(question(tight, slow, replicas=0))) == [0, 1]
    room = 5 * (1 << 30) // 2
    pair = [replace(m, memory_bytes=room) for m in (node(0, weight=1.0), slow)]
    assert names(chosen(question(*pair, replicas=1))) == [0]


def test_a_layout_without_room_for_replicas_is_no_rival() -> None:
    """Faster layers are not worth a replica less."""
    members = apart(node(0), node(1), ms=40.0)
    small = [replace(members[0], memory_bytes=0), replace(members[1], memory_bytes=1900 << 20)]
    found = chosen(question(*small, use_nodes="all", replicas=1))
    assert found.copies >= chosen(question(*small, use_nodes="all", layout_auto=False)).copies


def test_the_fastest_and_the_nearest_are_tried() -> None:
    """Subsets begin with the fastest one, and with the one that is nearest to the others."""
    assert subsets([node(0)]) == []
    fast_but_far = apart(node(0, 30.0), node(1, 15.0), node(2, 14.0), ms=1.0)
    far = [
        replace(fast_but_far[0], round_trips=tuple(replace(t, ms=50.0) for t in trips))
        for trips in [fast_but_far[0].round_trips]
    ]
    found = subsets([*far, *fast_but_far[1:]])
    assert frozenset({f"{0:016x}"}) in found
    assert frozenset({f"{1:016x}"}) in found
    assert frozenset({f"{1:016x}", f"{2:016x}"}) in found
    assert subsets([node(0, machine=""), node(1, machine="")])


@given(st.permutations(range(4)))
def test_every_leader_chooses_alike(order: list[int]) -> None:
    """The choice does not depend on the order in which members came."""
    members = apart(*(node(i, 4.0 + 5 * i) for i in range(4)), ms=3.0)
    leader = members[0]
    found = {
        chosen(question(*sorted(members, key=lambda m: m.name), leader=leader)),
        chosen(question(*sorted((members[i] for i in order), key=lambda m: m.name), leader=leader)),
    }
    assert len(found) == 1


# --- what the cluster has settled -----------------------------------------------------------------


def test_the_first_plan_settles_what_the_founder_was_told() -> None:
    """Later plans say the same, whoever leads; only a layout that nobody asked for may change."""
    layers = choose(question(*apart(node(0), node(1), ms=40.0), use_nodes="all"))
    first = charter(None, config(quorum="last-man"), None)
    assert first == {
        "layout": "heads",
        "layout_auto": True,
        "quorum": "last-man",
        "use_nodes": "auto",
    }
    assert charter(None, config(), layers)["layout"] == "layers"
    assert charter(None, config(layout="heads"), layers)["layout"] == "heads"
    told = plan_of(node(0), node(1), use_nodes="all")
    assert charter(told, config(), layers) == {
        "layout": "heads",
        "layout_auto": False,
        "quorum": "majority",
        "use_nodes": "all",
    }
    assert charter(replace(told, layout_auto=True), config(), layers)["layout"] == "layers"


def test_a_plan_is_replaced_by_a_faster_layout_where_it_may_be() -> None:
    """The reason names both layouts and what is predicted."""
    prediction = Prediction(0.05, 0.0, 0.0)
    choice = Choice("layers", frozenset(), frozenset(), prediction, 0)
    plan = plan_of(node(0), node(1), layout_auto=True)
    assert faster(plan, choice) == "layers instead of heads: 20 tok/s predicted"
    assert faster(plan, choice._replace(layout="heads")) == ""
    assert faster(plan, None) == ""
    assert faster(replace(plan, layout_auto=False), choice) == ""


def test_the_leader_asks_itself_only_when_something_changed() -> None:
    """The same members give the same object; nobody is asked where nothing is to be chosen."""
    chooser, members = Chooser(config()), [node(0), node(1)]
    found = chooser.look(None, members, members[0])
    assert found is not None
    assert chooser.look(None, reversed(members), members[0]) is found
    assert chooser.look(plan_of(*members), members, members[0]) is None
    assert chooser.look(None, [], members[0]) is None
    assert Chooser(config(layout="heads", use_nodes="all")).look(None, members, node(0)) is None


# --- what is told ---------------------------------------------------------------------------------


def test_a_plan_tells_what_fewer_nodes_would_reach() -> None:
    """Tokens per second by number of nodes, most first, and who owns nothing."""
    members = [node(0, weight=1.0), node(1, weight=1.0), node(2, 2.0, weight=1.0)]
    all_three = prediction_object(plan_of(*members))
    assert (all_three["nodes"], all_three["of"], all_three["left_out"]) == (3, 3, [])
    assert [o["nodes"] for o in all_three["alternatives"]] == [2, 1]
    assert all_three["alternatives"][0]["names"] == ["n0", "n1"]
    assert all_three["alternatives"][0]["tokens_per_s"] > all_three["tokens_per_s"]
    idle = replace(plan_of(*members[:2]), members=(*members[:2], members[2]))
    two = prediction_object(idle)
    assert (two["nodes"], two["of"], two["left_out"]) == (2, 3, ["n2"])
    assert two["tokens_per_s"] == all_three["alternatives"][0]["tokens_per_s"]
    assert [o["nodes"] for o in two["alternatives"]] == [3, 1]


@pytest.mark.parametrize("layout", ["heads", "layers"])
def test_what_is_unknown_is_null(layout: str) -> None:
    """No figure is made up, and whose speed lacks is named."""
    told = prediction_object(plan_of(node(0), node(1, 0.0), layout=layout))
    assert (told["tokens_per_s"], told["unknown"]) == (None, ["n1"])
    assert told["nodes"] == 2


def test_nobody_owns_units_before_the_first_plan() -> None:
    """Without a plan there are no owners."""
    assert owner_ids(None) == frozenset()
    assert owner_ids(plan_of(node(0))) == {node(0).node_id}
