"""The prefill budget, whatever steps take."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.core.prefill_budget import LEAST_ROWS, PLAIN_EVERY, STRETCH, PrefillBudget

MOST = st.integers(1, 2048)


@given(
    MOST,
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 400), st.floats(0, 100)), max_size=120),
)
def test_a_prompt_goes_on_whatever_happens(most: int, steps: list[tuple[int, int, float]]) -> None:
    """A step has at least the least rows and at most all, or none and the next one has."""
    budget = PrefillBudget(most)
    for decoding, prefill, seconds in steps:
        rows = budget.rows(decoding)
        if rows == 0:
            budget.finished(decoding, 0, seconds)
            rows = budget.rows(decoding)
        assert min(LEAST_ROWS, most) <= rows <= most
        budget.finished(decoding, min(prefill, rows), seconds)


@given(
    st.floats(1e-3, 1),
    st.floats(0, 1e-2),
    st.floats(0, 1),
)
def test_growing_costs_never_pass_the_limit(plain: float, row: float, share: float) -> None:
    """Wherever rows are free at first and then each costs as much, no step beyond the least takes
    more than twice a plain one, and in the end they take nearly that or are as long as may be."""

    def took(rows: int) -> float:
        return max(plain, share * plain + row * rows)

    budget, most, rows = PrefillBudget(256), 256, 0
    for _ in range(4 * PLAIN_EVERY):
        rows = budget.rows(1)
        budget.finished(1, rows, took(rows))
        assert rows <= LEAST_ROWS or took(rows) <= STRETCH * plain
    rows = rows or budget.rows(1)
    assert rows == most or took(rows + max(2, rows // 8)) > 1.9 * plain
