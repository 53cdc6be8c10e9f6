"""When the leader proposes a plan: each rule, and which goes before which."""

from __future__ import annotations

from typing import Any

import pytest

from p2pinfer.core.plan_rules import Decision, Situation, boots, decide, may_work
from tests.plan_bench import member

WAIT, PROPOSE = False, True


def situation(**values: Any) -> Situation:
    """A plan in force with which all is well, but for `values`."""
    fields: dict[str, Any] = {
        "worker_ready": True,
        "suspects": (),
        "able": ("a", "b"),
        "unable": (),
        "min_nodes": 1,
        "served": True,
        "unplaceable": "",
        "proposed": True,
        **values,
    }
    return Situation(**fields)


RULES: tuple[tuple[dict[str, Any], Decision], ...] = (
    ({"worker_ready": False}, Decision(WAIT, "this node's worker to start")),
    ({"suspects": ("b", "c")}, Decision(WAIT, "a word from b, c")),
    (
        {"able": ("a", "b"), "served": False, "min_nodes": 3, "unable": ("c: no memory",)},
        Decision(WAIT, "2 of 3 nodes; c: no memory"),
    ),
    (
        {"able": (), "unable": ("b is slow",)},
        Decision(WAIT, "a node that can hold the model; b is slow"),
    ),
    ({"unplaceable": "too small"}, Decision(WAIT, "too small")),
    ({"proposed": False}, Decision(PROPOSE, "a new leader")),
    ({"lost": ("b",)}, Decision(PROPOSE, "b gone")),
    (
        {"unfit": ("b",), "unable": ("b: no memory",)},
        Decision(PROPOSE, "b to own nothing; b: no memory"),
    ),
    ({"step_failed": "a frame lacks"}, Decision(PROPOSE, "a frame lacks")),
    ({"astray": ("b",)}, Decision(PROPOSE, "b obeyed the plan no more")),
    ({"absent": ("b",)}, Decision(PROPOSE, "b gone")),
    ({"relieved": ("b",)}, Decision(PROPOSE, "b to own nothing")),
    ({"newcomers": ("c",)}, Decision(PROPOSE, "c joined", rebalance=True)),
    ({"loading": ("b",)}, Decision(WAIT, "b to load the weights")),
    ({"fit_again": ("b",)}, Decision(PROPOSE, "b fit again", rebalance=True)),
    ({"votes": "b to vote"}, Decision(PROPOSE, "b to vote")),
    ({"stragglers": ("b",)}, Decision(PROPOSE, "b ready at last")),
    (
        {"faster": "layers instead of heads"},
        Decision(PROPOSE, "layers instead of heads", rebalance=True),
    ),
    ({"prepared": "c ready"}, Decision(PROPOSE, "c ready", rebalance=True)),
)
URGENT = [rule for rule in RULES if rule[0].keys() & {"lost", "unfit", "step_failed", "astray"}]
"""Without such a plan no reply goes on."""


@pytest.mark.parametrize(("values", "decision"), RULES)
def test_each_rule_has_its_say(values: dict[str, Any], decision: Decision) -> None:
    """One reason alone leads to that decision."""
    assert decide(situation(**values)) == decision


@pytest.mark.parametrize("first", range(len(RULES)))
def test_the_first_rule_wins(first: int) -> None:
    """With several reasons the one that stands first in the list decides."""
    values: dict[str, Any] = {}
    for one, _ in reversed(RULES[first:]):
        values.update(one)
    expected = RULES[first][1]
    decision = decide(situation(**values))
    assert decision.propose == expected.propose
    assert decision.why.split(";")[0] == expected.why.split(";")[0]


@pytest.mark.parametrize(("values", "decision"), RULES[6:])
def test_what_can_wait_waits_for_a_lull(values: dict[str, Any], decision: Decision) -> None:
    """Replies that go on are interrupted at once only where they could not go on."""
    urgent = (values, decision) in URGENT
    assert decide(situation(lull=False, **values)).propose == urgent


def test_nothing_is_proposed_without_reason() -> None:
    """A plan with which all is well stays."""
    assert decide(situation()) == Decision(WAIT)


@pytest.mark.parametrize(
    ("values", "why"),
    [({"newcomers": ("c",)}, "the members to settle"), ({"fit_again": ("c",)}, "")],
)
def test_members_to_be_added_wait_until_all_is_quiet(values: dict[str, Any], why: str) -> None:
    """Several nodes that come together make one plan."""
    assert decide(situation(settled=False, **values)) == Decision(WAIT, why)


def test_enough_nodes_are_asked_for_before_the_first_plan_only() -> None:
    """A cluster that has served goes on with whoever remains; a first plan is for everybody."""
    assert decide(situation(min_nodes=3)) == Decision(WAIT)
    first = decide(situation(served=False, min_nodes=2, proposed=False))
    assert first == Decision(PROPOSE, "a new leader", rebalance=True)


def test_a_worker_that_has_started_makes_a_member_of_use() -> None:
    """It is known by its numeric class; a witness computes nothing."""
    assert may_work(member(1))
    assert may_work(member(1, numeric_class="", witness=True))
    assert not may_work(member(1, numeric_class=""))


def test_a_life_is_node_and_boot() -> None:
    """A node that was started again is not the one it was."""
    assert boots([member(1)]) != boots([member(1, boot=1)])
