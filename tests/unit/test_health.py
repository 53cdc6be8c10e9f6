"""A node's own lateness, the time for which it was awake, and its worker's silence."""

from __future__ import annotations

from math import inf

import pytest

from p2pinfer.core.health import LOADING_FACTOR, PAUSE_FACTOR, LocalHealth, WorkerWatch
from p2pinfer.core.timing import LAN


def test_a_punctual_node_has_no_doubts() -> None:
    """Running when asked, or a little later, costs no point, and all time is awake time."""
    health = LocalHealth(LAN)
    assert health.look(inf, 100.0) == 100.0
    assert health.look(100.1, 100.1) == 100.1
    assert health.look(100.2, 100.2 + LAN.late_after / 2) == 100.2 + LAN.late_after / 2
    assert (health.score, health.stretch) == (0.0, 1.0)
    assert health.told(7.0) == 7.0


def test_each_missed_heartbeat_period_costs_a_point_up_to_the_most() -> None:
    """Lateness lengthens patience in proportion, at most by max_health; punctuality restores it."""
    health = LocalHealth(LAN)
    health.look(0.1, 0.1)
    health.look(0.2, 0.3)
    assert health.stretch == pytest.approx(2.0)
    health.look(0.4, 5.0)
    assert health.score == LAN.max_health
    health.on_time(0.5)
    assert health.score == pytest.approx(LAN.max_health - 1)
    health.on_time(60.0)
    assert health.score == 0.0


def test_a_standstill_is_no_time() -> None:
    """A node that was stopped for long goes on as if it had been asleep since it was to run."""
    health = LocalHealth(LAN)
    health.look(0.1, 0.1)
    assert health.look(0.2, 10.2) == pytest.approx(0.2)
    assert health.awake(10.3) == pytest.approx(0.3)
    assert health.told(0.3) == pytest.approx(10.3)


def test_a_wish_in_the_past_is_no_lateness() -> None:
    """Where a timer was due long ago, only the time since the last look can have been missed."""
    health = LocalHealth(LAN)
    health.look(0.1, 5.0)
    before = health.awake(5.0)
    assert health.look(0.1, 5.01) == pytest.approx(before + 0.01)


@pytest.mark.parametrize("stopped", [0.1, 0.3, 1.7, 12345.678])
@pytest.mark.parametrize("awake", [0.1, 0.7, 3.3, 1e6 + 0.1])
def test_a_timer_is_due_at_the_time_that_was_told(stopped: float, awake: float) -> None:
    """The outside time of a deadline, taken back inside, is never before that deadline."""
    health = LocalHealth(LAN)
    health.look(0.0, stopped)
    assert health.awake(health.told(awake)) >= awake
    assert health.told(inf) == inf


def test_a_worker_that_stops_reporting_hangs() -> None:
    """Silence of hang_after is a hang, until the next report; long silence gives the worker up."""
    watch = WorkerWatch(LAN)
    watch.said(10.0)
    assert watch.deadline == 10.0 + LAN.hang_after
    assert not watch.hung(10.0 + LAN.hang_after - 0.01)
    assert watch.hung(watch.deadline)
    assert watch.deadline == 10.0 + LAN.give_up_hung
    assert not watch.given_up(watch.deadline - 0.01)
    assert watch.given_up(watch.deadline)
    assert watch.silence(12.0) == 2.0
    watch.said(12.0)
    assert not watch.hung(12.0)
    assert watch.deadline > 12.0 + LAN.hang_after


def test_a_worker_that_starts_cannot_hang() -> None:
    """Before its first report nothing is expected of a worker."""
    watch = WorkerWatch(LAN)
    assert watch.deadline == inf
    assert not watch.hung(1e6)
    assert not watch.given_up(1e6)
    assert watch.silence(1e6) == 0.0


def test_long_pauses_lengthen_patience_for_a_while() -> None:
    """A worker whose reports lately came with pauses has three times the longest; it fades."""
    watch = WorkerWatch(LAN)
    for at in (0.0, 0.1, 0.6, 0.7):
        watch.said(at)
    assert watch.deadline == pytest.approx(0.7 + PAUSE_FACTOR * 0.5, rel=0.01)
    for at in range(3000):
        watch.said(0.8 + at / 10)
    assert watch.deadline == pytest.approx(300.7 + LAN.hang_after)


def test_a_true_hang_does_not_hide_the_next() -> None:
    """A long pause teaches patience up to a bound; one beyond was a hang, and teaches none."""
    watch = WorkerWatch(LAN)
    watch.said(0.0)
    watch.said(1.5)
    assert watch.deadline == pytest.approx(1.5 + PAUSE_FACTOR * LAN.hang_after)
    hung = WorkerWatch(LAN)
    hung.said(0.0)
    hung.said(50.0)
    assert hung.deadline == pytest.approx(50.0 + LAN.hang_after)


def test_a_worker_that_loads_may_be_silent_for_longer() -> None:
    """And what it does then teaches nothing about its steps."""
    watch = WorkerWatch(LAN)
    watch.said(0.0)
    watch.loading = True
    assert not watch.hung(LOADING_FACTOR * LAN.hang_after - 0.01)
    assert watch.hung(LOADING_FACTOR * LAN.hang_after)
    watch.said(1.5)
    watch.loading = False
    assert watch.deadline == pytest.approx(1.5 + LAN.hang_after)
