"""How many prefill rows a step may have beside replies, by a toy clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from p2pinfer.core.prefill_budget import (
    LEAST_ROWS,
    MIXED_STEPS,
    PLAIN_EVERY,
    STRETCH,
    PrefillBudget,
)

MOST = 256
PLAIN_S = 0.1


def linear(row_s: float) -> Callable[[int], float]:
    """Each row costs as much."""
    return lambda rows: PLAIN_S + row_s * rows


def hidden(row_s: float) -> Callable[[int], float]:
    """While the weights are read, rows are computed for nothing."""
    return lambda rows: max(PLAIN_S, row_s * rows)


def curved(row_s: float) -> Callable[[int], float]:
    """Attention over what is there already makes rows dearer and dearer."""
    return lambda rows: PLAIN_S + row_s * rows + 0.2 * row_s * rows**1.5


def measured(decoding: int = 1) -> PrefillBudget:
    """A budget that knows how long so many replies take alone."""
    budget = PrefillBudget(MOST)
    assert budget.rows(decoding) == 0
    budget.finished(decoding, 0, PLAIN_S)
    return budget


def read(budget: PrefillBudget, took: Callable[[int], float], steps: int) -> list[int]:
    """Rows of so many steps with prefill, beside one reply."""
    granted = []
    while len(granted) < steps:
        rows = budget.rows(1)
        if rows:
            granted.append(rows)
        budget.finished(1, rows, took(rows) if rows else PLAIN_S)
    return granted


def test_without_replies_there_is_no_limit() -> None:
    """A step may have all rows, before and after anything was measured; such steps say nothing."""
    budget = PrefillBudget(MOST)
    assert budget.rows(0) == MOST
    budget.finished(0, MOST, 9.0)
    assert budget.rows(1) == 0
    assert measured().rows(0) == MOST


@pytest.mark.parametrize("took", [linear(0.005), linear(0.0006), hidden(0.004), curved(0.002)])
def test_the_budget_comes_to_what_twice_the_time_allows(took: Callable[[int], float]) -> None:
    """It grows to as many rows as fit, and no step on the way takes longer than it may."""
    granted = read(measured(), took, 40)
    assert granted[0] == LEAST_ROWS
    assert granted == sorted(granted)
    assert all(took(rows) <= STRETCH * PLAIN_S for rows in granted)
    assert took(granted[-1]) > 1.75 * PLAIN_S


def test_steps_that_became_slow_are_answered_by_fewer_rows() -> None:
    """Two of the last three steps decide, and at once."""
    budget = measured()
    read(budget, linear(0.001), 30)
    slow = linear(0.004)
    granted = read(budget, slow, 10)
    assert slow(granted[0]) > 3 * PLAIN_S
    assert granted[2] < granted[1]
    assert all(slow(rows) <= STRETCH * PLAIN_S for rows in granted[2:])
    assert slow(granted[-1]) > 1.75 * PLAIN_S


def test_one_step_that_was_held_up_changes_nothing() -> None:
    """The median of the last steps counts."""
    budget = measured()
    before = read(budget, linear(0.002), 20)[-1]
    budget.finished(1, budget.rows(1), 5.0)
    assert budget.rows(1) == pytest.approx(before, abs=1)


def test_a_prompt_never_stops() -> None:
    """Where even a few rows take too long, they are computed all the same."""
    assert read(measured(), linear(1.0), 50) == [LEAST_ROWS] * 50


def test_no_more_rows_than_a_step_may_have() -> None:
    """However quick they are, also where a clock stood still."""
    assert read(measured(), linear(0.0), 20)[-1] == MOST
    assert read(measured(), lambda _: 0.0, 20)[-1] == MOST
    small = PrefillBudget(4)
    small.finished(1, 0, PLAIN_S)
    assert small.rows(1) == 4


def test_the_end_of_a_prompt_says_little() -> None:
    """A step that did not use its budget is not counted."""
    budget = measured()
    before = read(budget, linear(0.002), 20)[-1]
    for _ in range(MIXED_STEPS):
        budget.finished(1, 2, linear(0.002)(2))
    assert budget.rows(1) == before


def test_plain_steps_are_measured_again_under_constant_load() -> None:
    """Once in a while, so that the measure does not grow old."""
    budget = measured()
    read(budget, linear(0.002), PLAIN_EVERY)
    assert budget.rows(1) == 0
    budget.finished(1, 0, PLAIN_S)
    assert budget.rows(1) > LEAST_ROWS


def test_each_number_of_replies_has_its_own_measure() -> None:
    """Up to powers of two: a batch takes longer than one reply."""
    budget = measured()
    granted = read(budget, linear(0.002), 20)[-1]
    assert budget.rows(2) == 0
    budget.finished(2, 0, 2 * PLAIN_S)
    assert budget.rows(2) > granted
    assert budget.rows(3) == 0
    budget.finished(3, 0, 2 * PLAIN_S)
    assert budget.rows(4) == budget.rows(2)


def test_the_median_of_plain_steps_counts() -> None:
    """One that was held up does not make room for more prefill."""
    budget = measured()
    for seconds in (PLAIN_S, PLAIN_S, 3.0):
        budget.finished(1, 0, seconds)
    assert read(budget, linear(0.002), 20) == read(measured(), linear(0.002), 20)
