"""How long a step takes by a plan, from measured speeds."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from p2pinfer.core.planner import make_plan
from p2pinfer.core.prediction import (
    EXCHANGE_S,
    HALF_LAYER_S,
    QUANTISED_HALF_S,
    STEP_S,
    WAITING,
    Prediction,
    predict,
    rates,
    round_trip_s,
)
from p2pinfer.core.topology import holdings, weight_bytes
from p2pinfer.types import Fence, Member, ModelSpec, RoundTrip
from tests.model_specs import LLAMA_1B

HERE = "a" * 16
MODEL = msgspec.structs.replace(LLAMA_1B, tied=True)
"""The shape of Llama-3.2-1B."""


def node(number: int, gb_s: float = 15.0, **changes: Any) -> Member:
    """Node `number`, of that speed and weight, on the one machine unless said otherwise."""
    fields = {
        "node_id": f"{number:016x}",
        "boot_id": "0" * 16,
        "name": f"n{number}",
        "address": f"tcp://h{number}:7720",
        "numeric_class": "n",
        "product_gb_s": gb_s,
        "weight": gb_s or 1.0,
        "machine": HERE,
        **changes,
    }
    return Member(**fields)


def apart(*members: Member, ms: float = 0.0) -> list[Member]:
    """The same members, each on a machine of its own, so far from one another."""
    return [
        replace(
            m,
            machine=m.node_id,
            round_trips=tuple(
                RoundTrip(node_id=other.node_id, ms=ms) for other in members if other is not m
            ),
        )
        for m in members
    ]


def predicted(*members: Member, layout: str = "heads", model: ModelSpec = MODEL) -> Prediction:
    """What is predicted for all of them; it must be known."""
    found = known(*members, layout=layout, model=model)
    assert found is not None
    return found


def known(*members: Member, layout: str = "heads", model: ModelSpec = MODEL) -> Prediction | None:
    """The same, where it may be unknown."""
    plan = make_plan(
        members=members,
        model=model,
        layout=layout,
        fence=Fence(1, 1),
        cluster_id="0" * 16,
        leader_id=members[0].node_id,
    )
    return predict(plan)


def exchanged(step: Prediction) -> float:
    """Seconds of exchanges without the waiting for the last."""
    return step.exchange_s - WAITING * (step.compute_s - STEP_S)


def reading(step: Prediction) -> float:
    """Seconds in which weights are read, of what an unquantised model computes."""
    return step.compute_s - 32 * HALF_LAYER_S - STEP_S


def test_one_node_reads_all_weights() -> None:
    """Alone it exchanges nothing: bytes over speed, and what each half layer and step takes."""
    plan = make_plan(
        members=[node(0)],
        model=MODEL,
        layout="heads",
        fence=Fence(1, 1),
        cluster_id="0" * 16,
        leader_id="0" * 16,
    )
    whole = sum(weight_bytes(MODEL, held) for held in holdings(plan, 0))
    found = predict(plan)
    assert found is not None
    assert found.compute_s == pytest.approx(whole / 15e9 + 32 * HALF_LAYER_S + STEP_S)
    assert (found.exchange_s, found.handover_s) == (0.0, 0.0)
    assert found.tokens_per_s == pytest.approx(1 / found.step_s)


def test_two_nodes_share_the_reading() -> None:
    """Each reads half, and they exchange twice in each layer and wait for one another."""
    one, two = predicted(node(0)), predicted(node(0), node(1))
    assert reading(two) == pytest.approx(reading(one) / 2, rel=0.01)
    assert 32 * EXCHANGE_S < exchanged(two) < 32 * 1.2 * EXCHANGE_S
    assert two.tokens_per_s > one.tokens_per_s


def test_quantised_layers_have_less_beside_their_products() -> None:
    """Most of it is part of what the product library computes."""
    int8 = msgspec.structs.replace(MODEL, quant="int8")
    many, none = predicted(node(0, 1e6), model=int8), predicted(node(0, 1e6))
    assert none.step_s - many.step_s == pytest.approx(32 * (HALF_LAYER_S - QUANTISED_HALF_S), 0.01)


def test_nodes_of_one_machine_share_its_memory() -> None:
    """What all read together is no more than the memory gives; elsewhere each has its own."""
    pair = [node(0, read_gb_s=20.0), node(1, read_gb_s=20.0)]
    shared = rates(pair)
    assert shared == {m.node_id: pytest.approx(10e9) for m in pair}
    assert rates(apart(*pair)) == {m.node_id: 15e9 for m in pair}
    assert predicted(*pair).compute_s > predicted(*apart(*pair)).compute_s
    assert rates([node(0), node(1)]) == {m.node_id: 15e9 for m in pair}
    assert rates([node(0, machine=""), node(1, 0.0)]) is None


def test_the_slowest_is_waited_for() -> None:
    """Where shares are equal, a node half as fast makes each half layer twice as long."""
    slow = predicted(node(0, weight=1.0), node(1, 7.5, weight=1.0))
    fair = predicted(node(0, weight=1.0), node(1, 15.0, weight=1.0))
    assert reading(slow) == pytest.approx(2 * reading(fair), rel=0.01)
    assert predicted(node(0), node(1, 7.5)).compute_s < slow.compute_s


def test_distance_costs_heads_more_than_layers() -> None:
    """Heads exchange 32 times in a step, layers hand over once and come back."""
    members = apart(node(0), node(1), ms=20.0)
    heads, layers = predicted(*members), predicted(*members, layout="layers")
    assert heads.exchange_s > 32 * 0.010
    assert layers.exchange_s == 0.0
    assert 0.020 < layers.handover_s < 0.025
    assert layers.tokens_per_s > heads.tokens_per_s
    near = apart(node(0), node(1))
    assert predicted(*near).tokens_per_s > predicted(*near, layout="layers").tokens_per_s


def test_a_stage_of_several_waits_for_its_own_only() -> None:
    """In layout 2x2 the members of a stage exchange, and hand over to the next stage."""
    mixed = predicted(*(node(i) for i in range(4)), layout="2x2")
    heads = predicted(*(node(i) for i in range(4)))
    assert 0 < exchanged(mixed) < exchanged(heads)
    assert mixed.handover_s > heads.handover_s > 0


def test_a_leader_without_units_is_told_of() -> None:
    """It makes the steps and draws: its way to the owners counts."""
    far = [node(0, weight=0.0), node(1)]
    assert predicted(*apart(*far, ms=30.0)).handover_s > 0.030
    assert predicted(*far).handover_s < 0.001


def test_who_is_of_both_stages_hands_over_to_itself() -> None:
    """One that took over the next stage too has the hidden states already."""
    plan = make_plan(
        members=[node(0), node(1)],
        model=MODEL,
        layout="layers",
        fence=Fence(1, 1),
        cluster_id="0" * 16,
        leader_id=node(0).node_id,
    )
    first, second = plan.stages
    both = replace(
        second,
        head_owners=first.head_owners,
        mlp_owners=first.mlp_owners,
        vocab_owners=(0,) * len(second.vocab_owners),
    )
    alone = predict(replace(plan, stages=(first, both)))
    assert alone is not None
    assert alone.handover_s == 0.0


def test_nothing_is_said_where_anything_is_unknown() -> None:
    """No speed, or no round trip of two that exchange, hand over or are told: no prediction."""
    assert known(node(0), node(1, 0.0)) is None
    strangers = [node(0, machine=""), node(1, machine="")]
    assert known(*strangers) is None
    assert known(*strangers, layout="layers") is None
    assert known(node(0, weight=0.0, machine=""), node(1, machine="")) is None


def test_the_longer_of_two_measurements_counts() -> None:
    """Both ends measure; who is at one place has no way to go."""
    there = RoundTrip(node_id=f"{1:016x}", ms=4.0)
    back = RoundTrip(node_id=f"{0:016x}", ms=6.0)
    one = node(0, machine="", round_trips=(there,))
    other = node(1, machine="", round_trips=(back,))
    assert round_trip_s(one, other) == round_trip_s(other, one) == 0.006
    assert round_trip_s(one, node(1, machine="")) == 0.004
    assert round_trip_s(one, one) == round_trip_s(node(0), node(1)) == 0.0
    assert round_trip_s(node(0, machine=""), node(1, machine="")) is None


@given(
    st.lists(st.floats(1.0, 100.0), min_size=1, max_size=6),
    st.sampled_from(["heads", "layers"]),
    st.floats(0, 50.0),
    st.floats(1.01, 4.0),
)
def test_faster_and_nearer_is_never_slower(
    speeds: list[float], layout: str, ms: float, times: float
) -> None:
    """With the same shares, faster nodes make a shorter step, and longer ways a longer one."""
    members = [node(i, gb_s, weight=1.0) for i, gb_s in enumerate(speeds)]
    before = predicted(*apart(*members, ms=ms), layout=layout)
    faster = [node(i, gb_s * times, weight=1.0) for i, gb_s in enumerate(speeds)]
    assert predicted(*apart(*faster, ms=ms), layout=layout).step_s < before.step_s
    further = predicted(*apart(*members, ms=ms + 1.0), layout=layout)
    assert further.step_s > before.step_s or len(speeds) == 1
    assert before.step_s > 0


def test_a_machine_is_the_same_whatever_the_order() -> None:
    """Round trips are symmetric, so the order of the members says nothing."""
    members = apart(node(0), node(1), node(2), ms=3.0)
    assert {round_trip_s(a, b) for a, b in combinations(members, 2)} == {0.003}
