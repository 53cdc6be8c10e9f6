"""The leader's part in steps: what it sends, and what it reports when it is committed."""

from __future__ import annotations

import msgspec
import pytest

from p2pinfer.core.orders import (
    FenceSettled,
    RequestEnded,
    StartRequest,
    TokenLog,
    TokensCommitted,
)
from p2pinfer.core.step_maker import StepMaker
from p2pinfer.core.topology import topology
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.limits import MAX_STEP_SLOTS
from p2pinfer.types import SamplingParams
from p2pinfer.wire.messages import DrawnToken, FinalToken, Step
from tests.step_plans import Offer, plan_of

PLAN = plan_of(2)
FENCE = PLAN.fence
STEP_S = 0.1
SETTLED = FenceSettled(fence=FENCE)


def log(request_id: int, *tokens: int) -> TokenLog:
    """A log of a prompt of two tokens."""
    return TokenLog(
        request_id=request_id, term=1, prompt_tokens=2, params=SamplingParams(), tokens=tokens
    )


def maker(*logs: TokenLog, nodes: int = 2) -> StepMaker:
    """The leader of a plan of `nodes`, to whom all listen."""
    return StepMaker(topology(plan_of(nodes), 0), range(nodes), logs)


def start(
    request_id: int, *, most: int = 5, received: tuple[int, ...] = (), computed: int = 0
) -> StartRequest:
    """A request with the prompt (5, 6)."""
    return StartRequest(
        request_id=request_id,
        prompt_ids=(5, 6),
        received=received,
        params=SamplingParams(max_tokens=most, ignore_eos=True),
        computed=computed,
    )


def next_of(work: StepMaker) -> Step:
    """The next step, which there is."""
    step = work.next_step()
    assert step is not None
    return step


def committed(*tokens: tuple[int, int, int]) -> TokensCommitted:
    """(request, index, token) of each."""
    drawn = tuple(DrawnToken(request_id=r, index=i, token=t) for r, i, t in tokens)
    return TokensCommitted(fence=FENCE, tokens=drawn)


def ended(request_id: int, reason: str, total: int, code: str = "") -> RequestEnded:
    """How a request ended."""
    return RequestEnded(
        fence=FENCE, request_id=request_id, reason=reason, total_tokens=total, code=code
    )


def test_a_reply_of_one_node() -> None:
    """Alone, each token is committed by the step that carries it, and the last by its own."""
    work = maker(nodes=1)
    assert work.start(start(1, most=2)) == []
    step = next_of(work)
    assert (step.fence, step.step, step.link_seq) == (FENCE, 1, 0)
    assert work.sent(1.0) == [SETTLED]
    work.finished(step, {1: 50}, STEP_S)
    step = next_of(work)
    assert (step.step, step.slots[0].tokens) == (2, (50,))
    assert work.sent(2.0) == [committed((1, 0, 50))]
    work.finished(step, {1: 51}, STEP_S)
    step = next_of(work)
    assert step.finals == (FinalToken(request_id=1, position=3, token=51),)
    assert work.sent(3.0) == [committed((1, 1, 51)), ended(1, "length", 2)]
    work.finished(step, {}, STEP_S)
    step = next_of(work)
    assert (step.ended, step.slots, step.finals) == ((1,), (), ())
    assert work.sent(4.0) == []
    assert work.next_step() is None


def test_nothing_is_told_before_the_others_have_it() -> None:
    """The last token is not final, nor its log forgotten, until all have it."""
    work = maker()
    work.start(start(1, most=1))
    step = next_of(work)
    assert work.sent(1.0) == []
    assert work.acked(1, 1) == [SETTLED]
    work.finished(step, {1: 50}, STEP_S)
    step = next_of(work)
    assert work.sent(2.0) == []
    work.finished(step, {}, STEP_S)
    assert work.next_step() is None
    assert work.acked(1, 2) == [committed((1, 0, 50)), ended(1, "length", 1)]
    assert next_of(work).ended == (1,)


def test_logs_that_were_agreed_on_are_settled_by_an_empty_step() -> None:
    """Once, and only where there are logs; any step will do."""
    assert maker().next_step() is None
    work = maker(log(1, 5, 6, 7))
    step = next_of(work)
    assert step == Step(fence=FENCE, step=1, link_seq=0, slots=())
    assert work.sent(0.0) == []
    work.finished(step, {}, STEP_S)
    assert work.next_step() is None
    assert work.acked(1, 1) == [SETTLED]
    assert work.acked(1, 1) == []
    busy = maker(log(1, 5, 6, 7))
    busy.start(start(1, received=(7,), computed=2))
    step = next_of(busy)
    assert [(slot.start, slot.tokens) for slot in step.slots] == [(2, (7,))]
    busy.sent(0.0)
    busy.finished(step, {1: 8}, STEP_S)
    assert busy.acked(1, 1) == [SETTLED]


def test_a_complete_reply_ends_after_the_fence_is_settled() -> None:
    """What its log says is not known to be with everybody before."""
    work = maker(log(1, 5, 6, 7))
    assert work.start(start(1, most=1, received=(7,))) == []
    next_of(work)
    assert work.sent(0.0) == []
    assert work.acked(1, 1) == [SETTLED, ended(1, "length", 1)]
    assert next_of(work).ended == (1,)


def test_what_cannot_be_computed_ends_in_an_error() -> None:
    """And nodes that have its log forget it."""
    work = maker(log(1, 5, 6, 7))
    order = msgspec.structs.replace(start(1), prompt_ids=())
    assert [
        (report.request_id, report.code)
        for report in work.start(order)
        if isinstance(report, RequestEnded)
    ] == [(1, "empty_prompt")]
    assert next_of(work).ended == (1,)


def test_a_cancelled_request_is_silent() -> None:
    """Tokens of it that are on their way are never told, also when its id is used again."""
    work = maker()
    for request_id in (1, 2):
        work.start(start(request_id))
    step = next_of(work)
    work.sent(0.0)
    work.finished(step, {1: 50, 2: 60}, STEP_S)
    step = next_of(work)
    work.sent(0.0)
    work.cancel(1)
    work.start(start(1, received=(90,)))
    work.finished(step, {1: 51, 2: 61}, STEP_S)
    assert work.acked(1, 2) == [SETTLED, committed((2, 0, 60))]
    step = next_of(work)
    assert step.ended == (1,)
    assert [(slot.request_id, slot.start) for slot in step.slots] == [(2, 3)]
    work.finished(step, {2: 62}, STEP_S)
    assert [(slot.request_id, slot.start) for slot in next_of(work).slots] == [(2, 4), (1, 0)]


def test_many_tokens_come_in_several_reports() -> None:
    """No report has more tokens than a message takes."""
    work = maker()
    for request_id in range(MAX_STEP_SLOTS):
        work.start(start(request_id))
    for _ in range(3):
        step = next_of(work)
        work.sent(0.0)
        work.finished(step, {slot.request_id: 50 for slot in step.slots}, STEP_S)
    reports = work.acked(1, 3)
    sizes = [len(report.tokens) for report in reports if isinstance(report, TokensCommitted)]
    assert sizes == [MAX_STEP_SLOTS, MAX_STEP_SLOTS]


def test_an_acknowledgement_may_be_overdue() -> None:
    """The oldest step that is not committed counts, and who lacks it is named."""
    work = maker()
    assert work.overdue(100.0, 1.0) is None
    work.start(start(1))
    step = next_of(work)
    work.sent(10.0)
    work.finished(step, {1: 50}, STEP_S)
    step = next_of(work)
    work.sent(12.0)
    assert work.overdue(11.0, 1.0) is None
    assert work.overdue(11.1, 1.0) == 1
    work.acked(1, 1)
    assert work.overdue(13.0, 1.0) is None
    assert work.overdue(13.1, 1.0) == 1
    work.acked(1, 2)
    assert work.overdue(99.0, 1.0) is None


def test_a_lie_is_no_acknowledgement() -> None:
    """Of a step that was never sent."""
    with pytest.raises(RemoteProtocolError):
        maker().acked(1, 1)


def test_there_is_room_for_the_least_of_the_members() -> None:
    """The pool counts blocks of the least room that a member has."""
    plan = plan_of(2, offer=Offer(kv_bytes=1))
    work = StepMaker(topology(plan, 0), range(2), ())
    reports = work.start(msgspec.structs.replace(start(1), params=SamplingParams(max_tokens=200)))
    assert [report.code for report in reports if isinstance(report, RequestEnded)] == [
        "prompt_too_long"
    ]


def test_last_words_tell_what_was_drawn_and_compute_nothing() -> None:
    """Another plan is to come: what nobody was told would be drawn again."""
    work = maker()
    work.start(start(1))
    work.start(start(2, most=1))
    step = next_of(work)
    work.sent(1.0)
    work.acked(1, 1)
    work.finished(step, {1: 50, 2: 60}, STEP_S)
    words = work.last_words()
    assert words is not None
    assert (words.step, words.slots) == (2, ())
    assert {(f.request_id, f.position, f.token) for f in words.finals} == {(1, 2, 50), (2, 2, 60)}
    assert work.sent(2.0) == []
    assert work.acked(1, 2) == [committed((1, 0, 50), (2, 0, 60)), ended(2, "length", 1)]
    work.finished(words, {}, STEP_S)
    assert work.scheduler.running == 1


def test_after_last_words_steps_may_go_on() -> None:
    """The next one computes what was told, and it is told to no client twice."""
    work = maker(nodes=1)
    work.start(start(1, most=2))
    step = next_of(work)
    work.sent(1.0)
    work.finished(step, {1: 50}, STEP_S)
    words = work.last_words()
    assert words is not None
    assert work.sent(2.0) == [committed((1, 0, 50))]
    work.finished(words, {}, STEP_S)
    assert work.last_words() is None
    step = next_of(work)
    assert (step.step, step.slots[0].start, step.slots[0].tokens) == (3, 2, (50,))
    assert work.sent(3.0) == []
    work.finished(step, {1: 51}, STEP_S)
    assert next_of(work).finals == (FinalToken(request_id=1, position=3, token=51),)
    assert work.sent(4.0) == [committed((1, 1, 51)), ended(1, "length", 2)]
