"""What nodes tell of measured speeds: coarse, and steady."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.core.events import WorkerReady
from p2pinfer.core.orders import Speed
from p2pinfer.core.speed import (
    GB_S_PER_THREAD,
    LEAST_WEIGHT,
    MOST_WEIGHT,
    SHORTEST_MS,
    described,
    round_trip_ms,
    weight_of,
)
from p2pinfer.limits import MAX_ROUND_TRIP_MS
from p2pinfer.types import Member

ME = Member(
    node_id="0" * 16, boot_id="1" * 16, name="anna", address="tcp://127.0.0.1:7720", weight=3.0
)


def ready(speed: Speed) -> WorkerReady:
    """What a worker of that speed says."""
    return WorkerReady(
        numeric_class="n", device="cpu", threads=2, memory_bytes=1 << 30, speed=speed
    )


def test_a_usual_thread_has_weight_1() -> None:
    """Measured weights are on the scale of those that nobody measured."""
    assert weight_of(GB_S_PER_THREAD) == 1.0
    assert weight_of(4 * GB_S_PER_THREAD) == 4.0


@pytest.mark.parametrize("measured", [0.0, -1.0])
def test_what_was_not_measured_has_no_weight(measured: float) -> None:
    """0 says that it is unknown."""
    assert weight_of(measured) == 0.0


@given(st.floats(1e-9, 1e12))
def test_weights_are_few_and_near(measured: float) -> None:
    """A weight is within half a step of what was measured, and never outside the bounds."""
    weight = weight_of(measured)
    assert LEAST_WEIGHT <= weight <= MOST_WEIGHT
    if LEAST_WEIGHT < weight < MOST_WEIGHT:
        assert weight * GB_S_PER_THREAD == pytest.approx(measured, rel=0.1, abs=1e-3)


@given(st.floats(0.1, 1e4), st.floats(0.92, 1.08))
def test_a_weight_stays_where_the_machine_is_as_fast_as_before(first: float, noise: float) -> None:
    """A second measurement of a machine, some percent off, gives the same weight."""
    before = weight_of(first)
    steps = abs(noise - 1) < 0.04
    if steps:
        assert weight_of(first * noise, before) == before
    assert weight_of(weight_of(first) * GB_S_PER_THREAD * noise, before) == before


def test_a_weight_moves_with_the_machine() -> None:
    """Half as fast is half the weight, whatever it was before."""
    assert weight_of(GB_S_PER_THREAD / 2, before=1.0) == 0.5


def test_short_round_trips_are_nothing() -> None:
    """Below what heartbeats can tell, a round trip is 0; once told, it must be clearly shorter."""
    assert round_trip_ms(0.0) == round_trip_ms(0.4) == round_trip_ms(SHORTEST_MS / 2) == 0.0
    assert round_trip_ms(30.0) == pytest.approx(30.0, rel=0.2)
    assert round_trip_ms(0.9, before=1.0) == 1.0
    assert round_trip_ms(0.3, before=1.0) == 0.0


@given(st.floats(0, 1e9), st.floats(0.85, 1.15))
def test_round_trips_stand_still(measured: float, noise: float) -> None:
    """What is told stays within the limit, and does not follow the noise."""
    told = round_trip_ms(measured)
    assert 0.0 <= told <= MAX_ROUND_TRIP_MS
    assert round_trip_ms(told * noise, before=told) == told


def test_a_measured_speed_gives_the_weight() -> None:
    """What the worker measured is the node's, unless somebody said what it is worth."""
    speed = Speed(product_gb_s=16.0, read_gb_s=30.0, weight=2.0, machine="a" * 16)
    me = described(ME, ready(speed), weighed=False)
    assert (me.weight, me.product_gb_s, me.read_gb_s, me.machine) == (2.0, 16.0, 30.0, "a" * 16)
    assert (me.threads, me.memory_bytes, me.numeric_class) == (2, 1 << 30, "n")
    assert described(ME, ready(speed), weighed=True) == me.__class__(
        **{name: getattr(me, name) for name in me.__struct_fields__} | {"weight": 3.0}
    )


def test_without_a_measurement_the_weight_stays() -> None:
    """A node whose speed is unknown has the weight that it was given at its start."""
    assert described(ME, ready(Speed()), weighed=False).weight == 3.0
