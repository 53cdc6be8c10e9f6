"""What a node learns of the time that steps take."""

from __future__ import annotations

import msgspec
import pytest

from p2pinfer.core.step_clock import UNKNOWN_S, StepClock
from p2pinfer.core.token_log import TokenLogs
from p2pinfer.core.topology import topology
from p2pinfer.replicator import Replicator
from p2pinfer.step_engine import StepEngine
from p2pinfer.step_links import StepLinks, Traffic
from p2pinfer.types import Fence, SamplingParams
from p2pinfer.wire.messages import Slot, Step
from tests.lockstep import members
from tests.step_plans import plan_of

LISTENER = 1
"""The second member of a plan in which the first owns all."""


class Silent(StepLinks):
    """Links on which nothing is awaited."""

    def __init__(self) -> None:
        self.traffic = Traffic()

    def begin(self, step: int, limit_s: float) -> None:
        """A step begins."""


class Nobody(Replicator):
    """No standby anywhere."""

    def __init__(self) -> None:
        pass

    def stepped(self, step: Step) -> None:
        """Written."""

    def finished(self, step: Step) -> None:
        """Computed."""


@pytest.mark.parametrize("me", [LISTENER, 0])
def test_only_steps_that_wait_for_others_tell_how_long_one_may_take(me: int) -> None:
    """Who owns nothing is done at once; when it owns units its first step has long."""
    plan = plan_of(1)
    plan = msgspec.structs.replace(plan, members=(plan.members[0], members(2)[1]))
    clock = StepClock()
    engine = StepEngine(
        *(topology(plan, me), None, Silent()),
        logs=TokenLogs(),
        step_clock=clock,
        replicator=Nobody(),
    )
    slot = Slot(request_id=1, start=0, tokens=(1, 2, 3), params=SamplingParams(), sample=False)
    step = Step(fence=Fence(1, 1), step=1, link_seq=0, slots=(slot,))
    engine.compute(step)
    engine.finish(step)
    assert (clock.limit(3) == UNKNOWN_S) == (me == LISTENER)
