"""Plans that can wait do not interrupt replies in the middle of a step, nor twice in a row."""

from __future__ import annotations

from math import ceil

import pytest

from p2pinfer.core import events as e
from p2pinfer.core.orders import GiveWay
from p2pinfer.core.timing import LAN
from p2pinfer.types import Fence
from tests.plan_bench import Office, plan_of, serving

STEP_S = 0.125


def busy(bench: Office) -> Office:
    """A reply is under way, and goes on."""
    bench.requests.running = 1
    for _ in range(10):
        go_on(bench)
    return bench


def go_on(bench: Office, **sees: object) -> None:
    """One more step's tokens are committed; if the worker is asked to give way, it does."""
    bench.now += STEP_S
    fence = bench.plan.fence
    bench.maker.committed(e.TokensCommitted(fence=fence, tokens=()), bench.now)
    bench.look(**sees)
    for order in bench.ordered(GiveWay):
        bench.look(STEP_S / 2, **sees)
        assert bench.proposed() == [], "a step is in hand"
        bench.maker.gave_way(order.fence, bench.now)
        bench.look(**sees)


def test_a_newcomer_waits_for_the_end_of_a_step() -> None:
    """However long ago the plan in force came: a step that is stopped is computed again."""
    bench = busy(serving(2))
    bench.join(3)
    bench.look(LAN.settle + STEP_S / 2)
    assert bench.proposed() == []
    go_on(bench)
    assert bench.proposed() == ["node3 joined"]


def test_where_nothing_comes_of_it_the_worker_is_asked_again_after_a_while() -> None:
    """What it was asked for may be over, or a doubt may forbid a plan: replies go on meanwhile."""
    bench = busy(serving(2))
    bench.join(3)
    bench.now += LAN.settle
    bench.look()
    [order] = bench.ordered(GiveWay)
    assert order.fence == bench.plan.fence
    bench.look(0.01)
    assert bench.ordered(GiveWay) == []
    bench.maker.gave_way(order.fence, bench.now)
    bench.look(suspects=("node2",))
    bench.look(0.01, suspects=())
    assert bench.proposed() == []
    waited = 0
    while not (found := bench.proposed()):
        go_on(bench)
        waited += 1
    assert (found, waited) == (["node3 joined"], 1 + ceil(LAN.undisturbed / STEP_S))


def test_a_worker_that_gave_way_under_another_plan_says_nothing_about_this_one() -> None:
    """The word was on its way when the plan came into force."""
    bench = busy(serving(2))
    bench.join(3)
    bench.now += LAN.settle
    bench.look()
    bench.maker.gave_way(Fence(1, 99), bench.now)
    bench.look()
    assert bench.proposed() == []


def test_replies_go_on_between_two_plans() -> None:
    """A vote waits until the newcomer's plan has been in force for some steps."""
    bench = busy(serving(2))
    bench.join(3)
    bench.now += LAN.settle
    go_on(bench)
    assert bench.proposed() == ["node3 joined"]
    bench.adopt(1, 2, 3)
    waited = 0
    while not (found := bench.proposed()):
        go_on(bench)
        waited += 1
    assert (found, waited) == (["node3 to vote"], 1 + ceil(LAN.undisturbed / STEP_S))


def test_where_no_token_comes_a_plan_waits_no_longer_than_that() -> None:
    """A long prompt is being read."""
    bench = busy(serving(2))
    bench.join(3)
    bench.look(LAN.undisturbed_max - 0.1)
    assert bench.proposed() == []
    assert bench.maker.deadline == pytest.approx(bench.now + 0.1)
    bench.look(0.1)
    assert bench.proposed() == ["node3 joined"]


def test_what_is_urgent_interrupts_at_once() -> None:
    """A loss, or a dead voter that would be missed when the next one dies."""
    bench = busy(serving(3))
    bench.now += STEP_S / 2
    bench.lose(2)
    bench.look()
    assert bench.proposed() == ["node2 gone"]
    heir = Office(3, base=plan_of(4), base_active=False, term=7)
    heir.requests.running = 1
    heir.look(lost={4})
    heir.adopt(1, 2, 3)
    heir.proposed()
    heir.look()
    assert heir.proposed() == ["node4 to vote no more"]


def test_the_loss_of_who_owns_nothing_can_wait() -> None:
    """A drained node that leaves at last, or a witness that dies, stops no reply at all: it is
    taken out when nothing runs, or by the next plan."""
    bench = serving(3)
    for _ in ("it is to own nothing", "others own it", "they have replicas"):
        bench.look(1.0, draining={2})
        bench.adopt(1, 2, 3)
    bench.requests.running = 1
    for _ in range(10):
        go_on(bench, draining={2})
    bench.proposed()
    bench.now += STEP_S / 2
    bench.lose(2)
    bench.look()
    for _ in range(100):
        go_on(bench)
    assert bench.proposed() == []
    bench.requests.running = 0
    bench.look()
    assert bench.proposed() == ["node2 gone"]


def test_the_loss_of_who_keeps_replicas_waits_for_a_moment_only() -> None:
    """Another death would cost what it kept."""
    bench = serving(4)
    for _ in ("it is to own nothing", "others own it"):
        bench.look(1.0, draining={2})
        bench.adopt(1, 2, 3, 4)
    bench.proposed()
    bench.requests.running = 1
    bench.lose(2)
    bench.look()
    waited = 0
    while not (found := bench.proposed()):
        go_on(bench)
        waited += 1
    assert (found, waited) == (["node2 gone"], 1 + ceil(LAN.undisturbed / STEP_S))


def test_replicas_are_given_up_when_all_have_theirs() -> None:
    """Or when one of them is late."""
    for late in (set(), {1}):
        bench = serving(2)
        bench.join(3)
        for _ in ("the newcomer's plan", "its vote, and its units"):
            bench.look(1.0)
            bench.adopt(1, 2, 3)
        bench.proposed()
        bench.look(1.0, unready=late)
        assert bool(bench.proposed()) != bool(late)
        bench.look(LAN.replicas_late)
        assert bench.proposed() == (["replicas are complete"] if late else [])


def test_nobody_who_leaves_waits_until_all_have_their_replicas() -> None:
    """It goes when what it keeps is given up."""
    bench = serving(4)
    for _ in ("it is to own nothing", "others own it"):
        bench.look(1.0, draining={2})
        bench.adopt(1, 2, 3, 4)
    bench.proposed()
    bench.look(1.0, unready={3})
    assert bench.proposed() == ["replicas are complete"]
