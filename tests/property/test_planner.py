"""Plans over random models, members and layouts."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.core.planner import (
    MIN_KV_POSITIONS,
    PlacementError,
    holding,
    make_plan,
    sender_of_hidden,
    stage_members,
    validate,
)
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
        held = holding(plan, index)
        for kind, units in (
            (UnitKind.HEAD, held.head_units),
            (UnitKind.MLP, held.mlp_units),
            (UnitKind.VOCAB, held.vocab_units),
        ):
            assert not units or units == tuple(range(units[0], units[-1] + 1))
            depth = range(held.span.start, held.span.end) if kind is not UnitKind.VOCAB else (0,)
            seen += [(kind, layer, unit) for layer in depth for unit in units]
        if held.stage is not None:
            assert index in stage_members(plan, held.stage)
            if held.stage > 0:
                sender = sender_of_hidden(plan, held.stage, index)
                assert holding(plan, sender).stage == held.stage - 1
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
    outsiders = [
        i
        for i, m in enumerate(plan.members)
        if m.witness or holding(plan, i).stage not in (None, number)
    ]
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
    held, model = holding(plan, index), plan.model
    depth = held.span.end - held.span.start
    positions = min(MIN_KV_POSITIONS, model.max_positions)
    return (
        sum(unit_weight_bytes(model, UnitKind.HEAD, u) * depth for u in held.head_units)
        + kv_bytes_per_position(model, depth) * positions * len(held.head_units)
        + sum(unit_weight_bytes(model, UnitKind.MLP, u) * depth for u in held.mlp_units)
        + sum(unit_weight_bytes(model, UnitKind.VOCAB, u) for u in held.vocab_units)
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
