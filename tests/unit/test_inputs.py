"""How far inputs are kept: a beginning without a hole, of the spans that a node computes."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from p2pinfer.core.inputs import Inputs, input_spans
from p2pinfer.core.planner import make_plan
from p2pinfer.core.units import Slice
from p2pinfer.types import Fence, Plan
from tests.plan_bench import MODEL, member

HERE, THERE = Slice(0, 4), Slice(4, 8)


def inputs(*spans: Slice) -> Inputs:
    """What a node that computes these spans knows: nothing yet."""
    kept = Inputs()
    kept.hold(set(spans))
    return kept


def test_finished_steps_that_join_count() -> None:
    """Of all spans; one that begins behind a hole changes nothing."""
    kept = inputs(HERE, THERE)
    kept.finish(1, 0, 3)
    kept.finish(1, 3, 5)
    kept.finish(1, 7, 9)
    kept.finish(2, 1, 2)
    assert [kept.of(1, HERE), kept.of(1, THERE), kept.of(2, HERE)] == [5, 5, 0]
    kept.finish(1, 2, 4)
    assert kept.of(1, HERE) == 4


def test_inputs_go_with_their_span() -> None:
    """A span that is no longer computed has lost them, also when it comes back."""
    kept = inputs(HERE)
    kept.finish(1, 0, 3)
    kept.hold({HERE, THERE})
    assert (kept.of(1, HERE), kept.of(1, THERE)) == (3, 0)
    kept.hold({THERE})
    kept.hold({HERE})
    assert kept.of(1, HERE) == 0


def test_inputs_are_cut_and_forgotten_by_request() -> None:
    """What is less stays as it is."""
    kept = inputs(HERE)
    for request_id in (1, 2, 3):
        kept.finish(request_id, 0, 6)
    kept.cut(1, 4)
    kept.cut(1, 5)
    kept.cut(9, 0)
    kept.forget(2)
    kept.forget(9)
    assert [kept.of(request_id, HERE) for request_id in (1, 2, 3)] == [4, 0, 6]
    kept.lose()
    assert kept.of(3, HERE) == 0
    kept.finish(3, 6, 7)
    assert kept.of(3, HERE) == 0


def plan_of(layout: str, *, keeps_inputs: bool = True) -> Plan:
    """A plan of two members that own something, and one that owns nothing."""
    return make_plan(
        members=[member(n + 1, keeps_inputs=keeps_inputs, witness=n == 2) for n in range(3)],
        model=replace(MODEL, num_layers=8),
        layout=layout,
        fence=Fence(1, 1),
        cluster_id="c" * 16,
        leader_id=member(1).node_id,
    )


@pytest.mark.parametrize(
    ("layout", "spans"), [("heads", [{Slice(0, 8)}] * 2), ("layers", [{HERE}, {THERE}])]
)
def test_inputs_are_of_the_span_of_what_a_member_owns(layout: str, spans: list[set[Slice]]) -> None:
    """Who owns nothing computes nothing, and who is not to keep any keeps none."""
    assert [input_spans(plan_of(layout), i) for i in range(3)] == [*spans, set()]
    bare = plan_of(layout, keeps_inputs=False)
    assert [input_spans(bare, i) for i in range(3)] == [set()] * 3
