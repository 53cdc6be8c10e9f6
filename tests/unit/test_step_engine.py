"""One node's part in a step: what it learns of the time that steps take, and what is in its log."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
import torch

from p2pinfer.core.orders import StartRequest
from p2pinfer.core.step_clock import UNKNOWN_S, StepClock
from p2pinfer.core.token_log import TokenLogs
from p2pinfer.core.topology import topology
from p2pinfer.core.units import unit_bounds
from p2pinfer.errors import StepBroken
from p2pinfer.leader import Leader
from p2pinfer.model.runner import StageRunner, StepRun
from p2pinfer.model.sampling import penalise
from p2pinfer.replicator import Replicator
from p2pinfer.step_engine import StepEngine
from p2pinfer.step_links import StepLinks, Traffic
from p2pinfer.types import Fence, SamplingParams, UnitKind
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


class Known(StageRunner):
    """What it computes is known before."""

    def __init__(self, logits: np.ndarray) -> None:
        self._logits_of_all = torch.from_numpy(logits.copy())

    def run(self, slots: Sequence[Slot]) -> StepRun:
        """At once."""
        yield from ()
        return self._logits_of_all

    def forget(self, request_ids: Sequence[int]) -> None:
        """There is nothing."""


def test_whole_logits_are_those_after_the_penalty() -> None:
    """Of the slot that has one; candidates that do not settle a draw are followed by these."""
    mine = topology(plan_of(1), 0)
    model = mine.plan.model
    logits = np.random.default_rng(0).standard_normal((2, model.vocab_size)).astype(np.float32)
    engine = StepEngine(
        *(mine, Known(logits), Silent()),
        logs=TokenLogs(),
        step_clock=StepClock(),
        replicator=Nobody(),
    )
    tokens = (1, 2, model.vocab_size - 1)
    slots = [
        Slot(
            request_id=number,
            start=0,
            tokens=tokens,
            params=SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=penalty),
            prompt_tokens=3,
            capacity=8,
            sample=True,
        )
        for number, penalty in ((1, 1.5), (2, 1.0))
    ]
    step = Step(fence=mine.plan.fence, step=1, link_seq=0, slots=tuple(slots))
    engine.write(step)
    engine.compute(step)
    assert len(mine.vocab_units) > 1
    for unit in mine.vocab_units:
        start, end = unit_bounds(model, UnitKind.VOCAB, unit)
        penalised = penalise(logits[0, start:end], start, tokens, 1.5)
        assert np.array_equal(engine.own_logits(unit, [0]), penalised[None])
        assert np.array_equal(engine.own_logits(unit, [1, 0])[0], logits[1, start:end])
    assert not np.array_equal(engine.own_logits(mine.vocab_units[0], [0])[0, :3], logits[0, :3])
