"""When replies may be interrupted that could as well go on."""

from __future__ import annotations

from math import inf

from p2pinfer.core.lull import Lull
from p2pinfer.core.timing import LAN

SOME, MOST = LAN.undisturbed, LAN.undisturbed_max


def test_before_the_first_plan_every_moment_will_do() -> None:
    """No reply goes on under any."""
    assert Lull(LAN).is_at(1.0)


def test_replies_go_on_for_a_while_first() -> None:
    """Two plans in a row would be one long pause."""
    lull = Lull(LAN)
    lull.activated(1.0)
    seen = []
    for now in (1.2, 1.2 + SOME / 2, 1.2 + SOME):
        lull.stepped(now)
        seen.append(lull.is_at(now))
    assert seen == [False, False, True]


def test_a_step_that_has_just_ended_is_the_moment() -> None:
    """A plan that comes later stops the next step, whose work is lost."""
    lull = Lull(LAN)
    lull.activated(1.0)
    lull.stepped(1.1)
    lull.stepped(1.6)
    assert lull.is_at(1.6)
    assert not lull.is_at(1.61)


def test_replies_that_do_not_go_on_are_no_reason_for_ever() -> None:
    """A long prompt is read without a token."""
    lull = Lull(LAN)
    assert lull.deadline == -inf
    lull.activated(1.0)
    assert lull.deadline == 1.0 + MOST
    assert not lull.is_at(0.99 + MOST)
    assert lull.is_at(1.0 + MOST)


def test_as_long_as_replies_go_on_a_plan_waits_for_the_end_of_a_step() -> None:
    """However old the plan in force is."""
    lull = Lull(LAN)
    lull.activated(1.0)
    for step in range(1, 100):
        lull.stepped(1.0 + 0.1 * step)
    assert lull.deadline == 1.0 + 9.9 + MOST
    assert not lull.is_at(10.95)
    lull.stepped(11.0)
    assert lull.is_at(11.0)
