"""What the harness makes of the times at which tokens came."""

from __future__ import annotations

import pytest

from p2pinfer.types import SamplingParams
from tests.faults.watching import USUAL_TOKENS, Reading


def reading(*gaps: float) -> Reading:
    """One whose tokens came with these times between them, from 100.0 on."""
    found = Reading([], "", SamplingParams())
    found.times = [100.0]
    for gap in gaps:
        found.times.append(found.times[-1] + gap)
    return found


def test_a_plan_adds_what_is_longer_than_before_it() -> None:
    """Also where it was proposed just before the last token of the plan before arrived."""
    usual = [0.1] * USUAL_TOKENS
    seen = reading(*usual, 0.1, 0.4, 0.1)
    at = seen.times[USUAL_TOKENS + 1]
    for moment in (at + 0.05, at - 0.01):
        assert seen.added([moment]) == pytest.approx(0.3)
    assert seen.added([100.0 + 0.25]) == pytest.approx(0.0)
    assert seen.added([]) == 0.0


def test_of_several_plans_the_longest_counts() -> None:
    """Each is held against the tokens just before it."""
    seen = reading(*[0.1] * USUAL_TOKENS, 0.2, *[0.3] * USUAL_TOKENS, 0.5)
    first, second = seen.times[USUAL_TOKENS], seen.times[-2]
    assert seen.added([first]) == pytest.approx(0.2)
    assert seen.added([second]) == pytest.approx(0.2)
    assert seen.added([first, second]) == pytest.approx(0.2)


def test_what_goes_on_undisturbed_is_no_excess() -> None:
    """What counts is how much longer a reply stood still than it did before."""
    seen = reading(0.1, 0.3, 0.1, 0.1, 0.5, 0.2)
    struck, mended = seen.times[4], seen.times[5]
    assert seen.excess(struck, mended) == pytest.approx(0.2)
    assert seen.excess(seen.times[5], mended) == pytest.approx(0.2 - 0.5)
