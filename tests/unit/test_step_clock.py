"""When a step is overdue."""

from __future__ import annotations

import pytest

from p2pinfer.core.step_clock import LEAST_S, MEMORY, MOST_S, UNKNOWN_S, StepClock


def clock(**took: float) -> StepClock:
    """A clock that has seen one step for each `rROWS=seconds`."""
    made = StepClock()
    for rows, seconds in took.items():
        made.finished(int(rows[1:]), seconds)
    return made


def test_nothing_is_known_at_first() -> None:
    """The first step has long."""
    assert StepClock().limit(1) == StepClock().limit(1000) == UNKNOWN_S


def test_ten_times_what_comparable_steps_take() -> None:
    """By the median, so that one slow step changes nothing."""
    work = clock(r100=0.2)
    for seconds in (0.3, 0.25, 5.0, 0.1):
        work.finished(70, seconds)
    assert work.limit(128) == pytest.approx(2.5)


def test_no_limit_is_too_short_for_a_pause() -> None:
    """A decode step of a millisecond has half a second."""
    assert clock(r1=0.001).limit(1) == LEAST_S
    assert clock(r1=0.001).limit(0) == LEAST_S


def test_the_least_limit_may_be_longer() -> None:
    """On a machine that is too busy for half a second; a minute is the most all the same."""
    work = StepClock(5.0)
    work.finished(1, 0.1)
    assert work.limit(1) == 5.0
    for _ in range(20):
        work.overdue()
    assert work.limit(1) == MOST_S


@pytest.mark.parametrize(("rows", "limit"), [(8, 32.0), (2, 8.0), (1, 4.0), (256, MOST_S)])
def test_steps_of_another_size_are_scaled(rows: int, limit: float) -> None:
    """From the nearest size known, by rows, with a margin; fewer rows are no faster."""
    work = clock(r1=0.1)
    if rows == 1:
        work = clock(r2=0.1)
    assert work.limit(rows) == pytest.approx(limit)


def test_the_nearest_size_counts() -> None:
    """Of two that are as near, the smaller."""
    work = clock(r1=0.01, r16=1.0)
    assert work.limit(8) == pytest.approx(40.0)
    assert work.limit(4) == pytest.approx(1.6)


def test_patience_doubles_until_a_step_succeeds() -> None:
    """A machine that became slow finishes a step in the end; no limit is beyond a minute."""
    work = clock(r1=0.1)
    work.overdue()
    assert work.limit(1) == pytest.approx(2.0)
    work.overdue()
    assert work.limit(1) == pytest.approx(4.0)
    for _ in range(20):
        work.overdue()
    assert work.limit(1) == MOST_S
    work.finished(1, 0.1)
    assert work.limit(1) == pytest.approx(1.0)


def test_the_first_step_after_one_that_was_overdue_is_the_new_measure() -> None:
    """A network that became slow makes one step overdue, not every other one."""
    work = clock(r1=0.01, r100=0.01)
    for _ in range(MEMORY):
        work.finished(1, 0.01)
    work.overdue()
    work.finished(1, 0.7)
    assert work.limit(1) == pytest.approx(7.0)
    assert work.limit(100) == LEAST_S
    work.finished(1, 0.01)
    work.finished(1, 0.01)
    assert work.limit(1) == LEAST_S


def test_only_the_last_steps_count() -> None:
    """What was long ago is forgotten."""
    work = clock(r1=3.0)
    for _ in range(MEMORY):
        work.finished(1, 0.2)
    assert work.limit(1) == pytest.approx(2.0)
