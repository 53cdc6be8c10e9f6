"""When replies may be interrupted that could as well go on."""

from __future__ import annotations

from math import inf
from typing import Any

from p2pinfer.core.events import TellWorker
from p2pinfer.core.lull import Lull
from p2pinfer.core.orders import GiveWay
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.plan_rules import Situation
from p2pinfer.core.timing import LAN
from p2pinfer.types import Fence

SOME, MOST = LAN.undisturbed, LAN.undisturbed_max
FENCE = Fence(1, 3)


class Bench:
    """A lull, and what it asks the worker for."""

    def __init__(self) -> None:
        self.box = Outbox("a", lambda node_id: node_id)
        self.lull = Lull(LAN, self.box)

    def asks(self, now: float, **values: Any) -> bool:
        """Whether it asks the worker to give way, where it sees a plan that can wait."""
        self.lull.look(situation(**values), FENCE, now)
        orders = [out.order for out in self.box.take() if isinstance(out, TellWorker)]
        assert orders in ([], [GiveWay(fence=FENCE)])
        return bool(orders)


def situation(**values: Any) -> Situation:
    """Replies are under way, and somebody has joined."""
    fields: dict[str, Any] = {
        "worker_ready": True,
        "suspects": (),
        "able": ("a",),
        "unable": (),
        "min_nodes": 1,
        "served": True,
        "unplaceable": "",
        "proposed": True,
        "newcomers": ("b",),
        "lull": False,
        **values,
    }
    return Situation(**fields)


def test_before_the_first_plan_every_moment_will_do() -> None:
    """No reply goes on under any."""
    assert Bench().lull.is_at(1.0)


def test_replies_go_on_for_a_while_first() -> None:
    """Two plans in a row would be one long pause."""
    bench = Bench()
    bench.lull.activated(1.0)
    seen = [bench.asks(1.1)]
    for now in (1.2, 1.2 + SOME / 2, 1.2 + SOME):
        bench.lull.stepped(now)
        seen.append(bench.asks(now))
    assert seen == [False, False, False, True]


def test_the_worker_is_asked_once_and_only_for_a_plan_that_is_due() -> None:
    """It gives way at the end of its step."""
    bench = Bench()
    bench.lull.activated(1.0)
    bench.lull.stepped(1.1)
    assert not bench.asks(1.6, newcomers=())
    assert not bench.asks(1.6, lull=True)
    assert not bench.asks(1.6, suspects=("b",))
    assert bench.asks(1.6)
    assert not bench.asks(1.7)


def test_that_no_step_is_in_hand_is_the_moment() -> None:
    """A plan that comes at another stops a step, whose work is lost."""
    bench = Bench()
    bench.lull.activated(1.0)
    bench.lull.stepped(1.6)
    assert not bench.lull.is_at(1.6)
    bench.lull.gave_way(1.7)
    assert bench.lull.is_at(1.7)
    assert not bench.lull.is_at(1.71)


def test_who_gave_way_for_nothing_is_asked_again_when_replies_went_on() -> None:
    """As after a plan."""
    bench = Bench()
    bench.lull.activated(1.0)
    bench.lull.stepped(1.1)
    assert bench.asks(1.6)
    bench.lull.gave_way(1.7)
    assert not bench.asks(1.7 + SOME)
    bench.lull.stepped(2.5)
    assert not bench.asks(2.5)
    assert bench.asks(2.5 + SOME)


def test_replies_that_do_not_go_on_are_no_reason_for_ever() -> None:
    """A long prompt is read without a token, or the worker says nothing."""
    lull = Bench().lull
    assert lull.deadline == -inf
    lull.activated(1.0)
    assert lull.deadline == 1.0 + MOST
    assert not lull.is_at(0.99 + MOST)
    assert lull.is_at(1.0 + MOST)
    lull.stepped(4.0)
    assert lull.deadline == 4.0 + MOST
    assert not lull.is_at(4.1)
