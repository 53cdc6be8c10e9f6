"""How much KV of each request is here, unit by unit: a beginning without a hole, or nothing."""

from __future__ import annotations

import pytest

from p2pinfer.core.coverage import Coverage, KvUnit, Run
from p2pinfer.core.units import Slice
from p2pinfer.limits import MAX_NODES

HERE, THERE = Slice(0, 4), Slice(4, 8)
A, B, C = (KvUnit(HERE, unit) for unit in range(3))
FAR = KvUnit(THERE, 0)


def coverage(computed: set[KvUnit], fed: set[KvUnit] = frozenset()) -> Coverage:  # type: ignore[assignment]
    """What a node that holds these units knows: nothing yet."""
    known = Coverage()
    known.hold(computed, fed)
    return known


def test_steps_cover_what_is_computed() -> None:
    """A step's end counts for each computed unit that has all positions before its start."""
    known = coverage({A, B}, {C})
    known.finish(1, 0, 3)
    known.finish(1, 3, 5)
    assert [known.of(1, unit) for unit in (A, B, C, FAR)] == [5, 5, 0, 0]
    known.finish(1, 7, 9)
    assert known.least(1) == known.most(1) == 5
    assert known.least(2) == known.most(2) == 0


def test_the_least_is_of_computed_units_only() -> None:
    """A replica that is behind holds nobody back; a node without units has computed nothing."""
    known = coverage({A}, {B})
    known.finish(1, 0, 4)
    known.join(1, B, 0, 2)
    assert (known.least(1), known.most(1)) == (4, 4)
    known.hold(set(), {A, B})
    assert (known.least(1), known.most(1)) == (0, 4)


def test_what_joins_counts() -> None:
    """A run may begin before the watermark; one that ends before it changes nothing."""
    known = coverage(set(), {A, B})
    for start, end, covered in ((0, 3, 3), (2, 5, 5), (1, 2, 5), (5, 6, 6)):
        known.join(1, A, start, end)
        assert known.of(1, A) == covered
    assert known.of(1, B) == 0


def test_only_kept_units_are_joined_and_without_a_hole() -> None:
    """Whoever writes KV has checked that before."""
    known = coverage({A}, {B})
    for unit, start in ((A, 0), (C, 0), (B, 1)):
        with pytest.raises(AssertionError):
            known.join(1, unit, start, 2)


def test_what_is_made_of_inputs_counts() -> None:
    """Of units that this node computes, from the first position that lacks."""
    known = coverage({A, B}, {C})
    known.finish(1, 0, 4)
    known.lose({A})
    known.recomputed(1, A, 0, 3)
    known.recomputed(1, B, 0, 3)
    assert [known.of(1, unit) for unit in (A, B, C)] == [3, 4, 0]
    for unit, start in ((A, 4), (C, 0)):
        with pytest.raises(AssertionError):
            known.recomputed(1, unit, start, 5)


def test_units_that_stay_in_any_way_keep_their_kv() -> None:
    """A replica that is promoted has what it had, so has an owner's that is a replica now; what is
    held no longer is gone, also when it comes back."""
    known = coverage({A, B}, {C})
    known.finish(1, 0, 4)
    known.join(1, C, 0, 3)
    known.hold({C}, {A})
    assert [known.of(1, unit) for unit in (A, B, C)] == [4, 0, 3]
    known.hold({A, B, C}, set())
    assert [known.of(1, unit) for unit in (A, B, C)] == [4, 0, 3]
    with pytest.raises(AssertionError):
        known.hold({A}, {A, B})


def test_cutting_is_for_all_units_of_a_request() -> None:
    """What is covered less stays as it is, and other requests do."""
    known = coverage({A}, {B})
    for request_id in (1, 2):
        known.finish(request_id, 0, 6)
        known.join(request_id, B, 0, 3)
    known.cut(1, 4)
    assert (known.of(1, A), known.of(1, B), known.of(2, A)) == (4, 3, 6)
    known.cut(9, 0)
    known.forget(2)
    known.forget(9)
    assert known.most(2) == 0


def test_lost_units_are_lost_of_every_request() -> None:
    """Others keep what they have."""
    known = coverage({A, B})
    known.finish(1, 0, 2)
    known.finish(2, 0, 3)
    known.lose({A, FAR})
    assert [known.of(request_id, unit) for request_id in (1, 2) for unit in (A, B)] == [0, 2, 0, 3]


def test_units_with_the_same_coverage_are_one_run() -> None:
    """By layers, then by unit; what has nothing is left out."""
    known = coverage({A, C}, {B, FAR})
    known.finish(1, 0, 4)
    known.join(1, B, 0, 2)
    known.join(1, FAR, 0, 4)
    assert [*known.runs(1)] == [Run(HERE, (0, 2), 4), Run(HERE, (1,), 2), Run(THERE, (0,), 4)]
    known.cut(1, 0)
    assert [*known.runs(1)] == [*known.runs(2)] == []


@pytest.mark.parametrize("spans", [1, 2])
def test_a_report_is_bounded(spans: int) -> None:
    """Where too many units differ those that differ the least are told together, as having what
    the least of them has; the least of all is exact."""
    held = {KvUnit(span, unit) for span in (HERE, THERE)[:spans] for unit in range(2 * MAX_NODES)}
    known = coverage(set(), held)
    for unit in held:
        known.join(1, unit, 0, 1000 - 10 * unit.unit - unit.unit % 2)
    runs = [*known.runs(1)]
    assert len(runs) == MAX_NODES
    told = {KvUnit(run.span, unit): run.positions for run in runs for unit in run.units}
    assert told.keys() == held
    assert all(told[unit] <= known.of(1, unit) for unit in held)
    assert min(told.values()) == min(known.of(1, unit) for unit in held)
    if spans == 1:
        assert max(known.of(1, unit) - told[unit] for unit in held) <= 20
