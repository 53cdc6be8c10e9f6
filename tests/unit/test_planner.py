"""The planner: who holds what, by weight and memory, in every layout."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from p2pinfer.core import tree
from p2pinfer.core.planner import (
    PlacementError,
    holdings,
    make_plan,
    sender_of_hidden,
    stage_members,
    validate,
)
from p2pinfer.core.units import Slice
from p2pinfer.errors import LocalProtocolError, RemoteProtocolError
from p2pinfer.types import Fence, Member, ModelSpec, Plan, UnitKind
from tests.model_specs import LLAMA_1B as MODEL

GIB = 1 << 30


def member(number: int, **changes: object) -> Member:
    """Node `number`, but for `changes`."""
    fields: dict[str, object] = {
        "node_id": f"{number:016x}",
        "boot_id": "0" * 16,
        "name": f"node{number:02}",
        "address": f"tcp://10.0.0.{number}:7720",
    }
    return Member(**{**fields, **changes})  # type: ignore[arg-type]


def plan_for(members: list[Member], layout: str = "heads", model: ModelSpec = MODEL) -> Plan:
    """A plan led by the first of `members`; it must be valid."""
    plan = make_plan(
        members=members,
        model=model,
        layout=layout,
        fence=Fence(1, 2),
        cluster_id="c" * 16,
        leader_id=members[0].node_id,
    )
    validate(plan)
    return plan


def nodes(count: int) -> list[Member]:
    """Equal nodes 0 to `count` - 1."""
    return [member(i) for i in range(count)]


def test_one_node_holds_all() -> None:
    """A single member owns every unit of every layer."""
    (held,) = holdings(plan_for(nodes(1)), 0)
    assert (held.stage, held.span) == (0, Slice(0, 16))
    assert held.head_units == tuple(range(8))
    assert held.mlp_units == tuple(range(8))
    assert held.vocab_units == tuple(range(32))


def test_a_plan_says_whom_it_is_for() -> None:
    """Fence, cluster, leader, voters and layout are in the plan; `auto` is `heads`."""
    plan = make_plan(
        members=[member(2), member(1, witness=True)],
        model=MODEL,
        layout="auto",
        fence=Fence(3, 4),
        cluster_id="c" * 16,
        leader_id=member(2).node_id,
    )
    assert (plan.fence, plan.cluster_id, plan.layout) == (Fence(3, 4), "c" * 16, "heads")
    assert [m.name for m in plan.members] == ["node01", "node02"]
    assert (plan.leader, plan.voters) == (1, (0, 1))
    assert holdings(plan, 0) == ()


def test_heads_that_do_not_divide_evenly() -> None:
    """Eight units on three nodes are runs of 3, 3 and 2, in an order that needs fewest subtrees."""
    stage = plan_for(nodes(3)).stages[0]
    for owners in (stage.head_owners, stage.mlp_owners):
        assert sorted(Counter(owners).values()) == [2, 3, 3]
        assert list(owners) == sorted(owners)
        runs = [[u for u, o in enumerate(owners) if o == node] for node in range(3)]
        assert sum(len(tree.cover(run, 8)) for run in runs) == 5


def test_more_nodes_than_heads() -> None:
    """With twelve nodes for eight heads four hold no head, but MLP and vocabulary units."""
    plan = plan_for(nodes(12))
    headless = [h for i in range(12) for h in holdings(plan, i) if not h.head_units]
    assert len(headless) == 4
    assert all(h.mlp_units and h.vocab_units for h in headless)


def test_weights_make_unequal_shares() -> None:
    """A node of weight 3 beside one of weight 1 holds three quarters of each kind."""
    stage = plan_for([member(0, weight=1.0), member(1, weight=3.0)]).stages[0]
    assert Counter(stage.head_owners) == {0: 2, 1: 6}
    assert Counter(stage.mlp_owners) == {0: 2, 1: 6}
    assert Counter(stage.vocab_owners) == {0: 8, 1: 24}


def test_of_equal_remainders_the_heavier_is_served() -> None:
    """Two layers by weights 1 and 3 are halves left over on both sides: the heavier takes both."""
    model = msgspec.structs.replace(MODEL, num_layers=2)
    plan = plan_for([member(0, weight=1.0), member(1, weight=3.0)], "layers", model)
    assert [stage_members(plan, s) for s in range(len(plan.stages))] == [(1,)]


def test_layers_are_shared_out_by_weight() -> None:
    """Layout `layers` gives each node a whole span by its weight, and the last the vocabulary."""
    members = [member(0, weight=1.0), member(1, weight=2.0), member(2, weight=1.0)]
    plan = plan_for(members, "layers")
    assert [(s.start, s.end) for s in plan.stages] == [(0, 4), (4, 12), (12, 16)]
    assert [stage_members(plan, s) for s in range(3)] == [(0,), (1,), (2,)]
    assert [bool(s.vocab_owners) for s in plan.stages] == [False, False, True]


def test_more_nodes_than_layers() -> None:
    """Layers are not split: with five nodes for three layers two hold nothing."""
    model = msgspec.structs.replace(MODEL, num_layers=3)
    plan = plan_for(nodes(5), "layers", model)
    assert len(plan.stages) == 3
    assert [[h.stage for h in holdings(plan, i)] for i in range(5)] == [[0], [1], [2], [], []]


def test_a_mixed_layout_has_stages_of_nodes() -> None:
    """2x2 is two stages of two nodes; each splits the heads of its layers."""
    plan = plan_for(nodes(4), "2x2")
    assert [(s.start, s.end) for s in plan.stages] == [(0, 8), (8, 16)]
    assert [stage_members(plan, s) for s in range(2)] == [(0, 1), (2, 3)]
    assert Counter(plan.stages[0].head_owners) == {0: 4, 1: 4}


def test_spare_members_of_a_mixed_layout_hold_nothing() -> None:
    """Of five members 2x2 takes the four heaviest."""
    members = [member(i, weight=1.0 if i == 1 else 2.0) for i in range(5)]
    plan = plan_for(members, "2x2")
    assert [[h.stage for h in holdings(plan, i)] for i in range(5)] == [[0], [], [0], [1], [1]]
    assert holdings(plan, 1) == ()


def test_every_stage_of_a_mixed_layout_has_a_layer() -> None:
    """A stage whose nodes are feeble still gets one layer, since it was asked for."""
    members = [member(0, weight=1e6), member(1, weight=0.001), member(2, weight=0.001)]
    plan = plan_for(members, "3x1")
    assert [(s.start, s.end) for s in plan.stages] == [(0, 14), (14, 15), (15, 16)]


def test_members_of_weight_nothing_hold_nothing() -> None:
    """Weight 0 is a node that serves clients only."""
    plan = plan_for([member(0, weight=0.0), member(1)])
    assert holdings(plan, 0) == ()


def test_units_move_to_where_there_is_memory() -> None:
    """A node with half a gibibyte is filled to the last unit; the roomy one takes the rest."""
    members = [member(0, memory_bytes=GIB // 2), member(1, memory_bytes=4 * GIB)]
    stage = plan_for(members).stages[0]
    counts = [o.count(0) for o in (stage.head_owners, stage.mlp_owners, stage.vocab_owners)]
    assert counts == [2, 1, 14]
    head, mlp, vocab = 2 * 2048 * 16 * 640, 2 * 2048 * 16 * 3 * 1024, 2 * 2048 * 4032
    head += 16 * 2 * 64 * 2 * 2048
    held = 2 * head + mlp + 14 * vocab
    assert held <= GIB // 2 < held + vocab


def test_layers_move_to_where_there_is_memory() -> None:
    """In layout `layers` whole layers move; a node too small for one holds nothing."""
    members = [member(0, memory_bytes=GIB // 2), member(1), member(2, memory_bytes=1 << 20)]
    plan = plan_for(members, "layers")
    assert [(s.start, s.end) for s in plan.stages] == [(0, 4), (4, 16)]
    assert holdings(plan, 2) == ()


@pytest.mark.parametrize("layout", ["heads", "layers", "2x1"])
def test_a_cluster_too_small_says_how_many_bytes_lack(layout: str) -> None:
    """The error names the model, the bytes that lack and who offers how much; one may retry."""
    members = [member(0, memory_bytes=GIB), member(1, memory_bytes=GIB)]
    with pytest.raises(PlacementError, match=r"\d+ bytes .*node00 1073741824, node01") as caught:
        plan_for(members, layout)
    assert (caught.value.code, caught.value.retryable) == ("not_ready", True)
    need = 2 * 2048 * (16 * (5120 + 3 * 8192) + 128256) + 16 * 8 * 2 * 64 * 2 * 2048
    assert f"need {need} bytes" in str(caught.value)
    lacking = int(str(caught.value).split(": ")[1].split()[0])
    assert (
        need - 2 * GIB <= lacking <= need - 2 * GIB + (64 << 20) * (1 if layout == "heads" else 3)
    )


def test_memory_that_is_exactly_enough_is_enough() -> None:
    """A node that offers just what weights and the least KV need holds the model; 1 less fails."""
    model = msgspec.structs.replace(
        MODEL, intermediate_size=8000, vocab_size=1000, max_positions=100
    )
    need = 2 * 2048 * (16 * (5120 + 3 * 8000) + 1000) + 16 * 8 * 2 * 64 * 2 * 100
    plan_for([member(0, memory_bytes=need)], model=model)
    with pytest.raises(PlacementError, match="fit: 1 bytes"):
        plan_for([member(0, memory_bytes=need - 1)], model=model)


def test_an_error_tells_members_without_a_limit() -> None:
    """A stage that must have a layer but has no room fails even beside an unlimited member."""
    with pytest.raises(PlacementError, match="node01 unlimited"):
        plan_for([member(0, memory_bytes=1), member(1)], "2x1")


@pytest.mark.parametrize(
    ("layout", "code", "message"),
    [
        ("rings", "invalid_request", "unknown layout 'rings'"),
        ("0x2", "invalid_request", "unknown layout"),
        ("17x1", "invalid_request", "17 stages, but llama has 16 layers"),
        ("2x2", "not_ready", "needs 4 nodes that hold units; 3 are here"),
    ],
)
def test_impossible_layouts_are_named(layout: str, code: str, message: str) -> None:
    """A layout that nobody knows, or that needs more nodes or layers, says so."""
    with pytest.raises(PlacementError, match=message) as caught:
        plan_for(nodes(3), layout)
    assert caught.value.code == code
    assert caught.value.retryable == (code == "not_ready")


def test_witnesses_alone_hold_no_model() -> None:
    """A cluster of witnesses waits for a node that can hold units."""
    with pytest.raises(PlacementError, match="witnesses"):
        plan_for([member(0, witness=True), member(1, weight=0.0)])


def test_only_able_members_own_units() -> None:
    """A member that may own nothing for now is listed without units."""
    plan = make_plan(
        members=nodes(3),
        model=MODEL,
        layout="heads",
        fence=Fence(1, 1),
        cluster_id="c" * 16,
        leader_id=member(1).node_id,
        able={member(0).node_id, member(2).node_id},
    )
    assert [m.name for m in plan.members] == ["node00", "node01", "node02"]
    assert stage_members(plan, 0) == (0, 2)


def test_a_leader_from_elsewhere_is_a_defect() -> None:
    """The leader is one of the members, of which there are at most sixteen."""
    for members, leader in ((nodes(2), "f" * 16), (nodes(17), nodes(1)[0].node_id)):
        with pytest.raises(LocalProtocolError):
            make_plan(
                members=members,
                model=MODEL,
                layout="heads",
                fence=Fence(),
                cluster_id="c" * 16,
                leader_id=leader,
            )


def test_receivers_of_hidden_states_share_the_senders() -> None:
    """The j-th node of a stage hears from node j mod n of the previous one."""
    plan = plan_for(nodes(4), "2x2")
    stages = (
        msgspec.structs.replace(plan.stages[0], mlp_owners=(0, 1) * 4),
        msgspec.structs.replace(plan.stages[1], head_owners=(2, 3, 4, 2, 3, 4, 2, 3)),
    )
    plan = msgspec.structs.replace(plan, stages=stages, members=tuple(nodes(5)))
    validate(plan)
    assert [sender_of_hidden(plan, 1, i) for i in (2, 3, 4)] == [0, 1, 0]


BASE = plan_for([*nodes(4), member(4, witness=True)], "2x2")


def edited(stage: int, **changes: object) -> Plan:
    """The base plan with one stage changed."""
    stages = list(BASE.stages)
    stages[stage] = msgspec.structs.replace(stages[stage], **changes)
    return msgspec.structs.replace(BASE, stages=tuple(stages))


MANY_HEADS = msgspec.structs.replace(MODEL, num_attention_heads=512, num_key_value_heads=512)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            msgspec.structs.replace(
                BASE, model=msgspec.structs.replace(MODEL, num_attention_heads=30)
            ),
            "do not divide",
        ),
        (msgspec.structs.replace(BASE, members=(BASE.members[0],) * 5), "node id twice"),
        (msgspec.structs.replace(BASE, leader=5), "leader or voters"),
        (msgspec.structs.replace(BASE, voters=(0, 0)), "leader or voters"),
        (msgspec.structs.replace(BASE, voters=(5,)), "leader or voters"),
        (msgspec.structs.replace(BASE, stages=BASE.stages[:1]), "8 of 16|vocab"),
        (msgspec.structs.replace(BASE, stages=BASE.stages[1:]), "must begin at 0"),
        (edited(0, end=7), "must begin at 7"),
        (edited(0, end=0), "not be empty"),
        (edited(1, end=15), "layer 15 of 16"),
        (edited(0, head_owners=BASE.stages[0].head_owners[1:]), "7 owners"),
        (edited(0, mlp_owners=(*BASE.stages[0].mlp_owners, 1)), "9 owners"),
        (edited(0, vocab_owners=(0,) * 32), "32 owners .* 0 vocab"),
        (edited(1, vocab_owners=()), "0 owners .* 32 vocab"),
        (edited(0, head_owners=(0,) * 7 + (9,)), "witness or to nobody"),
        (edited(0, head_owners=(0,) * 7 + (4,)), "witness or to nobody"),
        (edited(0, head_standbys=((1,),)), "1 lists of standbys"),
        (edited(0, head_standbys=((4,),) * 8), "witness or to nobody"),
        (edited(0, head_standbys=((1,),) * 8), "owner of a head unit as its standby"),
        (edited(1, mlp_standbys=((0, 0),) * 8), "one standby twice"),
        (msgspec.structs.replace(BASE, voters=()), "no voters"),
        (msgspec.structs.replace(BASE, old_voters=("0" * 16,) * 2), "one old voter twice"),
        (
            msgspec.structs.replace(
                BASE,
                model=MANY_HEADS,
                stages=(
                    msgspec.structs.replace(BASE.stages[1], start=0, head_owners=(2, 3) * 256),
                ),
            ),
            "scatters head units",
        ),
    ],
)
def test_a_broken_plan_is_refused(plan: Plan, message: str) -> None:
    """Each invariant of a plan from the wire is checked, and the error names the one broken."""
    with pytest.raises(RemoteProtocolError, match=message):
        validate(plan)


def test_standbys_may_be_named() -> None:
    """Lists of standbys, one for each unit, are part of a valid plan."""
    validate(edited(0, head_standbys=((1,),) * 4 + ((0,),) * 4, mlp_standbys=((),) * 8))


def test_owners_are_in_the_order_of_unit_kinds() -> None:
    """Heads, MLP, vocabulary: code that zips owners with `UnitKind` relies on it."""
    assert list(UnitKind) == [UnitKind.HEAD, UnitKind.MLP, UnitKind.VOCAB]
