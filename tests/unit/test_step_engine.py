"""One node's part in a step: what it learns of the time that steps take, and what is in its log."""

from __future__ import annotations

import msgspec
import pytest

from p2pinfer.core.orders import StartRequest
from p2pinfer.core.step_clock import UNKNOWN_S, StepClock
from p2pinfer.core.token_log import TokenLogs
from p2pinfer.core.topology import topology
from p2pinfer.errors import StepBroken
from p2pinfer.leader import Leader
from p2pinfer.replicator import Replicator
from p2pinfer.step_engine import StepEngine
from p2pinfer.step_links import StepLinks, Traffic
from p2pinfer.types import Fence, SamplingParams
from p2pinfer.wire.messages import Message, Slot, Step
from tests.lockstep import members
from tests.step_plans import plan_of

LISTENER = 1
"""The second member of a plan in which the first owns all."""


class Silent(StepLinks):
    """Links on which nothing is awaited, and which break when something is sent."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.deaf = set()

    def begin(self, step: int, limit_s: float) -> None:
        """A step begins."""

    def next_sequence(self, member: int) -> int:
        """The number of a frame."""
        return 0

    def send(self, member: int, message: Message) -> None:
        """It breaks."""
        raise StepBroken(members(2)[member].node_id, "takes no frame")


class Nobody(Replicator):
    """No standby anywhere."""

    def __init__(self) -> None:
        pass

    def stepped(self, step: Step) -> None:
        """Written."""

    def finished(self, step: Step) -> None:
        """Computed."""


def engine_of(me: int, logs: TokenLogs, clock: StepClock, links: StepLinks) -> StepEngine:
    """The engine of a member that computes nothing."""
    plan = plan_of(1)
    plan = msgspec.structs.replace(plan, members=(plan.members[0], members(2)[1]))
    return StepEngine(
        *(topology(plan, me), None, links), logs=logs, step_clock=clock, replicator=Nobody()
    )


@pytest.mark.parametrize("me", [LISTENER, 0])
def test_only_steps_that_wait_for_others_tell_how_long_one_may_take(me: int) -> None:
    """Who owns nothing is done at once; when it owns units its first step has long."""
    clock = StepClock()
    engine = engine_of(me, TokenLogs(), clock, Silent())
    slot = Slot(request_id=1, start=0, tokens=(1, 2, 3), params=SamplingParams(), sample=False)
    step = Step(fence=Fence(1, 1), step=1, link_seq=0, slots=(slot,))
    engine.compute(step)
    engine.finish(step)
    assert (clock.limit(3) == UNKNOWN_S) == (me == LISTENER)


def test_no_listener_has_a_longer_log_than_the_leader() -> None:
    """Its own log is the truth of its term: a step that it could not send to all is in it."""
    logs, links = TokenLogs(), Silent()
    leader = Leader(
        *(engine_of(0, logs, StepClock(), links), links, logs),
        listeners=(LISTENER,),
        agreed=(),
        report=lambda _: None,
    )
    leader.start(
        StartRequest(request_id=1, prompt_ids=(1, 2, 3), received=(), params=SamplingParams())
    )
    with pytest.raises(StepBroken):
        leader.run_step()
    assert tuple(logs.tokens(1)) == (1, 2, 3)
