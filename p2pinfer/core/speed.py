"""What a node tells of measured speeds and round trips: coarse, so that equals stay equal.

Two measurements of one thing differ by some percent. What plans go by is rounded to steps of a part
of a doubling, and a new measurement moves it only when it is clearly in another step, so plans do
not change with the noise.
"""

from __future__ import annotations

from math import log2

from msgspec.structs import replace

from p2pinfer.core.events import WorkerReady
from p2pinfer.limits import MAX_ROUND_TRIP_MS
from p2pinfer.types import Member

GB_S_PER_THREAD = 8.0
"""Weight 1 is what a usual thread multiplies: so measured weights, and those of machines where
nothing was measured (one per thread), are of one kind."""

STEPS_PER_DOUBLING = 4
HYSTERESIS = 0.75
"""In steps: how far from its present weight a machine must be measured to get another."""

LEAST_WEIGHT, MOST_WEIGHT = 0.001, 1e6


def weight_of(product_gb_s: float, before: float = 0.0) -> float:
    """The share of work of a node that multiplies so many GB of weights per second; 0 where nothing
    was measured. `before` is the weight that it had by an earlier measurement, 0: none."""
    if product_gb_s <= 0:
        return 0.0
    position = STEPS_PER_DOUBLING * log2(product_gb_s / GB_S_PER_THREAD)
    if before > 0 and abs(position - STEPS_PER_DOUBLING * log2(before)) <= HYSTERESIS:
        return before
    weight: float = 2.0 ** (round(position) / STEPS_PER_DOUBLING)
    return round(min(max(weight, LEAST_WEIGHT), MOST_WEIGHT), 4)


SHORTEST_MS = 1.0
"""Heartbeats tell time in milliseconds: what is shorter is not told from nothing."""

TRIP_STEPS_PER_DOUBLING = 2


def round_trip_ms(measured_ms: float, before: float = 0.0) -> float:
    """What is told of a round trip: in steps of half a doubling, and 0 below `SHORTEST_MS`; the
    same as `before` where it is not clearly something else."""
    position, known = (
        TRIP_STEPS_PER_DOUBLING * log2(max(ms, SHORTEST_MS / 2)) for ms in (measured_ms, before)
    )
    if abs(position - known) <= HYSTERESIS:
        return before
    told: float = 2.0 ** (round(position) / TRIP_STEPS_PER_DOUBLING)
    return round(min(told, MAX_ROUND_TRIP_MS), 2) if told >= SHORTEST_MS else 0.0


def described(member: Member, worker: WorkerReady, *, weighed: bool) -> Member:
    """A node once its worker has said how it computes; `weighed`: somebody said what it is worth,
    which counts more than any measurement."""
    speed = worker.speed
    return replace(
        member,
        numeric_class=worker.numeric_class,
        threads=worker.threads,
        memory_bytes=worker.memory_bytes,
        product_gb_s=speed.product_gb_s,
        read_gb_s=speed.read_gb_s,
        machine=speed.machine,
        weight=member.weight if weighed or not speed.weight else speed.weight,
    )
