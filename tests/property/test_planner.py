"""Plans over random models, members and layouts, and plans that follow others."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.core.holdings import owners_of, standbys_of
from p2pinfer.core.planner import (
    MIN_KV_POSITIONS,
    PlacementError,
    holdings,
    make_plan,
    may_own,
    sender_of_hidden,
    stage_members,
    validate,
)
from p2pinfer.core.replan import next_plan
from p2pinfer.core.units import kv_bytes_per_position, unit_count, unit_weight_bytes
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.types import DType, Fence, Member, ModelSpec, Plan, UnitKind


@st.composite
def models(draw: st.DrawFn) -> ModelSpec:
    """Any small model; nothing has to divide anything but query heads by KV heads."""
    heads = draw(st.integers(1, 12))
    return ModelSpec(
        name="random",
        model_id="",
        num_layers=draw(st.integers(1, 20)),
        hidden_size=draw(st.integers(1, 512)),
        num_attention_heads=heads * draw(st.sampled_from([1, 2, 4])),
        num_key_value_heads=heads,
        head_dim=draw(st.integers(1, 128)),
        intermediate_size=draw(st.integers(1, 20000)),
        vocab_size=draw(st.integers(1, 5000)),
        max_positions=draw(st.integers(1, 5000)),
        dtype=draw(st.sampled_from(DType)),
        kv_dtype=draw(st.sampled_from(DType)),
    )


@st.composite
def crowds(draw: st.DrawFn, weights: st.SearchStrategy[float]) -> list[Member]:
    """1 to 16 members; names may be equal, and the first can hold units."""
    count = draw(st.integers(1, 16))
    return [
        Member(
            node_id=f"{number:016x}",
            boot_id="0" * 16,
            name=draw(st.sampled_from(["a", "b", f"n{number}"])),
            address="tcp://host:7720",
            weight=draw(weights) if number else 1.0,
            witness=bool(number) and draw(st.integers(0, 5)) == 0,
        )
        for number in range(count)
    ]


WEIGHTS = st.sampled_from([0.0, 0.5, 1.0, 1.0, 2.0, 7.3, 1e6])
LAYOUTS = st.sampled_from(["auto", "heads", "layers", "1x1", "2x1", "1x3", "2x2", "3x2", "4x4"])


def planned(members: list[Member], model: ModelSpec, layout: str) -> Plan:
    """A plan led by the member with the lowest id."""
    return make_plan(
        members=members,
        model=model,
        layout=layout,
        fence=Fence(1, 1),
        cluster_id="c" * 16,
        leader_id="0" * 16,
    )


def any_plan(members: list[Member], model: ModelSpec, layout: str) -> Plan:
    """A plan by `layout`, or by heads where there are too few nodes or layers for it."""
    able = sum(m.weight > 0 and not m.witness for m in members)
    if "x" in layout:
        stages, height = map(int, layout.split("x"))
        if stages > model.num_layers or stages * height > able:
            layout = "heads"
    return planned(members, model, layout)


@given(crowds(WEIGHTS), models(), LAYOUTS)
def test_every_unit_of_every_layer_has_one_owner(
    members: list[Member], model: ModelSpec, layout: str
) -> None:
    """What all members hold together is the model, once, in runs; each hears a previous stage."""
    plan = any_plan(members, model, layout)
    validate(plan)
    seen: list[tuple[UnitKind, int, int]] = []
    for index in range(len(members)):
        assert len(holdings(plan, index)) <= 1
        for held in holdings(plan, index):
            for kind, units in (
                (UnitKind.HEAD, held.head_units),
                (UnitKind.MLP, held.mlp_units),
                (UnitKind.VOCAB, held.vocab_units),
            ):
                assert not units or units == tuple(range(units[0], units[-1] + 1))
                depth = range(*held.span) if kind is not UnitKind.VOCAB else (0,)
                seen += [(kind, layer, unit) for layer in depth for unit in units]
            assert index in stage_members(plan, held.stage)
            if held.stage > 0:
                sender = sender_of_hidden(plan, held.stage, index)
                assert sender in stage_members(plan, held.stage - 1)
    wanted = [
        (kind, layer, unit)
        for kind in UnitKind
        for layer in range(model.num_layers if kind is not UnitKind.VOCAB else 1)
        for unit in range(unit_count(model, kind))
    ]
    assert sorted(seen) == sorted(wanted)


@given(crowds(WEIGHTS), models(), LAYOUTS)
def test_members_of_equal_weight_differ_by_one_unit_at_most(
    members: list[Member], model: ModelSpec, layout: str
) -> None:
    """Within a stage shares are fair, and a heavier member never holds less of a kind."""
    plan = any_plan(members, model, layout)
    for number in range(len(plan.stages)):
        stage = plan.stages[number]
        group = stage_members(plan, number)
        for owners in (stage.head_owners, stage.mlp_owners, stage.vocab_owners):
            shares = [(plan.members[i].weight, owners.count(i)) for i in group]
            assert all(abs(a - b) <= 1 for v, a in shares for w, b in shares if v == w)
            assert all(a <= b for v, a in shares for w, b in shares if v < w)


@given(st.data(), crowds(WEIGHTS), models(), LAYOUTS)
def test_the_order_of_arrival_does_not_matter(
    data: st.DataObject, members: list[Member], model: ModelSpec, layout: str
) -> None:
    """Any permutation of the members makes the same plan."""
    plan = any_plan(members, model, layout)
    assert planned(data.draw(st.permutations(members)), model, plan.layout) == plan


@given(st.data(), crowds(WEIGHTS), models(), LAYOUTS)
def test_mutated_owners_are_caught(
    data: st.DataObject, members: list[Member], model: ModelSpec, layout: str
) -> None:
    """An owner too many or too few, or one who may not own this, makes a plan invalid."""
    plan = any_plan(members, model, layout)
    number = data.draw(st.integers(0, len(plan.stages) - 1))
    stage = plan.stages[number]
    last = number == len(plan.stages) - 1
    field = data.draw(st.sampled_from(["head_owners", "mlp_owners", "vocab_owners"]))
    owners = getattr(stage, field)
    outsiders = [i for i, m in enumerate(plan.members) if m.witness]
    wrong = data.draw(st.sampled_from([len(members), 255, -1, *outsiders]))
    mutants = [(*owners, *stage.head_owners[:1])]
    if field != "vocab_owners" or last:
        place = data.draw(st.integers(0, len(owners) - 1))
        mutants += [
            owners[:place] + owners[place + 1 :],
            (*owners[:place], wrong, *owners[place + 1 :]),
            (),
        ]
    mutant = msgspec.structs.replace(stage, **{field: data.draw(st.sampled_from(mutants))})
    stages = (*plan.stages[:number], mutant, *plan.stages[number + 1 :])
    with pytest.raises(RemoteProtocolError):
        validate(msgspec.structs.replace(plan, stages=stages))


def bytes_of(plan: Plan, index: int) -> int:
    """Weights and least KV of one member, counted unit by unit."""
    model = plan.model
    positions = min(MIN_KV_POSITIONS, model.max_positions)
    return sum(
        sum(unit_weight_bytes(model, UnitKind.HEAD, u) * depth for u in held.head_units)
        + kv_bytes_per_position(model, depth) * positions * len(held.head_units)
        + sum(unit_weight_bytes(model, UnitKind.MLP, u) * depth for u in held.mlp_units)
        + sum(unit_weight_bytes(model, UnitKind.VOCAB, u) for u in held.vocab_units)
        for held in holdings(plan, index)
        for depth in (held.span.end - held.span.start,)
    )


@given(st.data(), crowds(st.sampled_from([0.5, 1.0, 2.0])), models())
def test_no_member_is_filled_beyond_its_memory(
    data: st.DataObject, members: list[Member], model: ModelSpec
) -> None:
    """A plan respects every limit; there is one whenever room for a unit per member is spare."""
    whole = planned(members[:1], model, "heads")
    need = bytes_of(whole, 0)
    depth = model.num_layers
    positions = min(MIN_KV_POSITIONS, model.max_positions)
    largest = max(
        unit_weight_bytes(model, UnitKind.HEAD, 0) * depth
        + kv_bytes_per_position(model, depth) * positions,
        unit_weight_bytes(model, UnitKind.MLP, 0) * depth,
        unit_weight_bytes(model, UnitKind.VOCAB, 0),
    )
    able = [i for i, m in enumerate(members) if not m.witness]
    offers = [max(1, data.draw(st.integers(0, 2 * need // len(able)))) for _ in able]
    members = [
        msgspec.structs.replace(m, memory_bytes=offers[able.index(i)]) if i in able else m
        for i, m in enumerate(members)
    ]
    layout = data.draw(st.sampled_from(["heads", "layers"]))
    try:
        plan = planned(members, model, layout)
    except PlacementError as error:
        assert error.code == "not_ready"
        if layout == "heads":
            assert sum(offers) < need + len(able) * largest
        return
    validate(plan)
    for index, m in enumerate(plan.members):
        assert m.witness or bytes_of(plan, index) <= m.memory_bytes


Unit = tuple[int, UnitKind, int]
"""Stage, kind and number."""


def follow(
    previous: Plan | None,
    members: list[Member],
    able: list[Member],
    *,
    model: ModelSpec,
    layout: str = "heads",
    replicas: int = 0,
    rebalance: bool = True,
) -> Plan:
    """The plan after `previous`, which must be valid, led by the member with the lowest id."""
    leader = min(m.node_id for m in members)
    plan = next_plan(
        previous=previous,
        members=members,
        able=frozenset(m.node_id for m in able),
        model=model,
        layout=layout,
        fence=Fence(1, previous.fence.epoch + 1 if previous else 1),
        cluster_id="c" * 16,
        leader_id=leader,
        voters=[leader],
        replicas=replicas,
        rebalance=rebalance,
    )
    validate(plan)
    return plan


def owners_by_unit(plan: Plan) -> dict[Unit, str]:
    """The node id of each unit's owner."""
    return {
        (number, kind, unit): plan.members[owner].node_id
        for number, stage in enumerate(plan.stages)
        for kind, owners in zip(UnitKind, owners_of(stage), strict=True)
        for unit, owner in enumerate(owners)
    }


def standbys_by_unit(plan: Plan) -> dict[Unit, list[str]]:
    """The node ids of each unit's standbys, where any are named."""
    return {
        (number, kind, unit): [plan.members[i].node_id for i in named]
        for number, stage in enumerate(plan.stages)
        for kind, copies in zip(UnitKind, standbys_of(stage), strict=True)
        for unit, named in enumerate(copies)
    }


class Crowd:
    """Members that die, start again, come, and are unable for a while, one at a time."""

    def __init__(self, data: st.DataObject, members: list[Member]) -> None:
        self._data = data
        self._next = len(members)
        self.members = members
        self.unable: set[str] = set()

    @property
    def able(self) -> list[Member]:
        """Who may own units."""
        return [m for m in self.members if m.node_id not in self.unable and may_own(m)]

    def change(self, kinds: tuple[str, ...]) -> None:
        """One member dies, joins, starts again, or changes between able and unable."""
        kind = self._data.draw(st.sampled_from(kinds))
        one = self._data.draw(st.integers(0, len(self.members) - 1))
        member = self.members[one]
        if kind == "death" and len(self.members) > 1:
            self.members = self.members[:one] + self.members[one + 1 :]
        elif kind == "join" and len(self.members) < 16:
            fresh = {"node_id": f"{self._next:016x}", "name": f"n{self._next}"}
            self.members = [*self.members, msgspec.structs.replace(member, **fresh)]
            self._next += 1
        elif kind == "restart":
            again = msgspec.structs.replace(member, boot_id=f"{int(member.boot_id, 16) + 1:016x}")
            self.members = [*self.members[:one], again, *self.members[one + 1 :]]
        elif kind == "unable":
            self.unable ^= {member.node_id}


@given(st.data(), crowds(WEIGHTS), models(), LAYOUTS, st.integers(0, 3))
def test_whatever_happens_each_unit_has_one_able_owner(
    data: st.DataObject, members: list[Member], model: ModelSpec, layout: str, replicas: int
) -> None:
    """Through deaths, joins and restarts plans are valid, fit, and do not depend on the order."""
    whole = bytes_of(planned(members[:1], model, "heads"), 0)
    offers = st.sampled_from([0, 0, whole // 3, whole // 2, whole])
    members = [msgspec.structs.replace(m, memory_bytes=data.draw(offers)) for m in members]
    crowd, plan = Crowd(data, members), None
    for _ in range(data.draw(st.integers(1, 5))):
        args = (crowd.able,)
        more = {"model": model, "layout": layout, "replicas": replicas}
        try:
            after = follow(plan, crowd.members, *args, **more)  # type: ignore[arg-type]
        except PlacementError:
            crowd.change(("death", "join", "restart", "unable"))
            continue
        shuffled = data.draw(st.permutations(crowd.members))
        assert follow(plan, shuffled, *args, **more) == after  # type: ignore[arg-type]
        plan = after
        ids = {m.node_id for m in crowd.able}
        assert set(owners_by_unit(plan).values()) <= ids
        assert len(owners_by_unit(plan)) == sum(
            unit_count(model, kind) * (len(plan.stages) if kind is not UnitKind.VOCAB else 1)
            for kind in UnitKind
        )
        for named in standbys_by_unit(plan).values():
            assert len(named) <= replicas
            assert set(named) <= ids
        for index, m in enumerate(plan.members):
            assert not m.memory_bytes or bytes_of(plan, index) <= m.memory_bytes
        crowd.change(("death", "join", "restart", "unable"))


@given(st.data(), st.integers(2, 6), models(), st.sampled_from(["layers", "2x1", "2x2", "3x2"]))
def test_stages_outlive_their_owners(
    data: st.DataObject, spare: int, model: ModelSpec, layout: str
) -> None:
    """With a replica of each unit and deaths one at a time, no layer's KV is ever lost: only units
    of the dead move, to standbys. Newcomers then bring each stage a crew of its own again."""
    size = 1 if layout == "layers" else int(layout[-1])
    count = size * (spare if layout == "layers" else int(layout[0])) + data.draw(st.integers(0, 2))
    members = [
        Member(node_id=f"{i:016x}", boot_id="0" * 16, name=f"n{i}", address="tcp://host:7720")
        for i in range(count)
    ]
    crowd = Crowd(data, members)
    if "x" in layout and int(layout[0]) > model.num_layers:
        return
    more = {"model": model, "layout": layout, "replicas": 1}
    plan = follow(None, crowd.members, crowd.able, **more)  # type: ignore[arg-type]
    spans = [(stage.start, stage.end) for stage in plan.stages]
    for _ in range(data.draw(st.integers(1, count - 1))):
        before, standbys = owners_by_unit(plan), standbys_by_unit(plan)
        living = {m.node_id for m in crowd.members}
        crowd.change(("death",))
        (gone,) = living - {m.node_id for m in crowd.members}
        plan = follow(plan, crowd.members, crowd.able, rebalance=False, **more)  # type: ignore[arg-type]
        assert [(stage.start, stage.end) for stage in plan.stages] == spans
        for unit, owner in owners_by_unit(plan).items():
            assert owner == before[unit] or (before[unit] == gone and owner in standbys[unit])
    while len(crowd.members) < min(count, 16):
        crowd.change(("join",))
        plan = follow(plan, crowd.members, crowd.able, **more)  # type: ignore[arg-type]
    owning = [holdings(plan, index) for index in range(len(plan.members))]
    if layout != "layers":
        assert [(stage.start, stage.end) for stage in plan.stages] == spans
        assert max(map(len, owning)) == 1


def check_any_death(plan: Plan, crowd: Crowd, model: ModelSpec, replicas: int) -> list[Plan]:
    """Without any one member only its units move, to their standbys; the plans that follow."""
    before, standbys = owners_by_unit(plan), standbys_by_unit(plan)
    plans = []
    for gone in crowd.able:
        rest = [m for m in crowd.members if m != gone]
        able = [m for m in crowd.able if m != gone]
        if not able:
            continue
        after = follow(plan, rest, able, model=model, replicas=replicas)
        now = owners_by_unit(after)
        mine = {unit for unit, owner in before.items() if owner == gone.node_id}
        assert {unit for unit in now if now[unit] != before[unit]} == mine
        assert all(now[unit] in standbys[unit] for unit in mine if replicas)
        plans.append(after)
    return plans


@given(st.data(), crowds(WEIGHTS), models(), st.integers(0, 2))
def test_a_death_moves_the_dead_ones_units_only(
    data: st.DataObject, members: list[Member], model: ModelSpec, replicas: int
) -> None:
    """Whatever the weights: all others keep what they have, standbys take what is lost."""
    crowd, plan = Crowd(data, members), None
    for _ in range(data.draw(st.integers(1, 3))):
        plan = follow(plan, crowd.members, crowd.able, model=model, replicas=replicas)
        check_any_death(plan, crowd, model, replicas)
        crowd.change(("join",))


@given(st.data(), crowds(st.just(1.0)), models(), st.integers(0, 2))
def test_equal_members_stay_even(
    data: st.DataObject, members: list[Member], model: ModelSpec, replicas: int
) -> None:
    """After one change at a time, and any one death then, shares differ by one unit at most."""
    crowd, plan = Crowd(data, members), None
    for _ in range(data.draw(st.integers(1, 5))):
        if not crowd.able:
            break
        plan = follow(plan, crowd.members, crowd.able, model=model, replicas=replicas)
        again = follow(plan, crowd.members, crowd.able, model=model, replicas=replicas)
        assert again.stages == plan.stages
        for each in (plan, *check_any_death(plan, crowd, model, replicas)):
            able = {m.node_id for m in crowd.able}
            owning = [i for i, m in enumerate(each.members) if m.node_id in able]
            for owners in owners_of(each.stages[0]):
                counts = [owners.count(i) for i in owning]
                assert max(counts) - min(counts) <= 1
        crowd.change(("death", "join", "restart"))
