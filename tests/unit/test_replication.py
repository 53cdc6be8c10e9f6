"""Delta KV: what owners send, what standbys write, ask for and grant."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from p2pinfer.core import replication
from p2pinfer.core.replication import (
    ASK_AGAIN_S,
    LAG_S,
    computed_units,
    fed_units,
    pieces,
)
from p2pinfer.core.units import Slice
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.wire.messages import Credit
from p2pinfer.wire.tensors import Tensor, WireDType
from tests.plan_bench import MODEL
from tests.replication_bench import (
    FENCE,
    FRAME,
    MORE,
    PLAN,
    ROW,
    UNITS,
    WINDOW,
    asked,
    computed,
    feed_of,
    frame,
    question,
    replicas_of,
    runs,
    slot,
    take,
)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and frames of few rows."""
    monkeypatch.setattr(replication, "WINDOW_BYTES", WINDOW * ROW)
    monkeypatch.setattr(replication, "FRAME_BYTES", FRAME * ROW)
    monkeypatch.setattr(replication, "MORE_ROWS", MORE)


# --- the plan -------------------------------------------------------------------------------------


def test_units_are_computed_by_their_owner_and_fed_to_their_standbys() -> None:
    """With the stage, or the owner, of each; who holds nothing has neither."""
    assert computed_units(PLAN, 0) == {UNITS[0]: 0, UNITS[1]: 0}
    assert fed_units(PLAN, 0) == {UNITS[2]: 1}
    assert fed_units(PLAN, 1) == {UNITS[0]: 0, UNITS[1]: 0}
    assert computed_units(PLAN, 3) == fed_units(PLAN, 3) == {}


def test_a_run_is_cut_into_frames() -> None:
    """None is longer than `FRAME_BYTES`, unless one row is."""
    cut = [(p.start, p.end) for p in pieces(PLAN, 1, 1, UNITS[0], Slice(3, 20))]
    assert cut == [(3, 11), (11, 19), (19, 20)]
    long = replace(PLAN, model=replace(MODEL, head_dim=64))
    assert [p.end - p.start for p in pieces(long, 1, 1, UNITS[0], Slice(0, 2))] == [1, 1]


# --- the owner ------------------------------------------------------------------------------------


def test_what_a_step_has_written_goes_to_each_standby() -> None:
    """Unit by unit, in frames; the stage of each unit is known."""
    feed, logs = feed_of()
    assert feed.standbys == {1, 2}
    assert feed.stage_of(UNITS[1]) == 0
    computed(logs, slot(0, 10))
    assert runs([*feed.finished((slot(0, 10),))]) == [
        *((1, 0, 0, 8), (1, 0, 8, 10)),
        *((2, 1, 0, 8), (2, 1, 8, 10)),
        *((1, 1, 0, 8), (1, 1, 8, 10)),
    ]
    feed, logs = feed_of(2)
    computed(logs, slot(0, 3))
    assert (feed.standbys, [*feed.finished((slot(0, 3),))]) == (frozenset(), [])


def test_a_request_that_ended_is_not_sent() -> None:
    """What is not covered any more when it is to be sent is left out."""
    feed, logs = feed_of()
    computed(logs, slot(0, 3), slot(0, 3, request_id=2))
    logs.forget((2,))
    sent = [*feed.finished((slot(0, 3, request_id=2), slot(0, 3)))]
    assert {piece.request_id for piece in sent} == {1}


def test_no_more_is_sent_than_is_granted() -> None:
    """What has no credit is left out for good; the beginning of a run is of use without its end."""
    feed, logs = feed_of(credit=19)
    computed(logs, slot(0, 20))
    assert runs([*feed.finished((slot(0, 20),))]) == [
        *((1, 0, 0, 8), (1, 0, 8, 16)),
        *((2, 1, 0, 8), (2, 1, 8, 16)),
    ]
    computed(logs, slot(20, 22))
    assert runs([*feed.finished((slot(20, 22),))]) == [(1, 0, 20, 22), (2, 1, 20, 22)]
    assert [*feed.finished((slot(20, 22),))] == []


def test_credit_adds_up_to_the_window() -> None:
    """However much a standby grants, no more is remembered."""
    feed, logs = feed_of()
    feed.grant(2, Credit(fence=FENCE, bytes=(1 << 63) - 1))
    computed(logs, slot(0, 90))
    sent = [*feed.finished((slot(0, 90),))]
    assert sum(p.end - p.start for p in sent if p.member == 2) == WINDOW


def test_only_standbys_grant_credit() -> None:
    """Others are refused, and nothing is remembered of them."""
    feed, _ = feed_of()
    for other in (0, 3):
        with pytest.raises(RemoteProtocolError, match="credit"):
            feed.grant(other, Credit(fence=FENCE, bytes=1))


def test_what_a_link_does_not_take_costs_nothing() -> None:
    """The credit of a piece that was not sent is there for the next one."""
    feed, logs = feed_of(credit=1)
    computed(logs, slot(0, 1), slot(1, 2))
    first, *_ = feed.finished((slot(0, 1),))
    assert (first.member, runs([*feed.finished((slot(1, 2),))])) == (1, [])
    feed.unsent(first)
    assert runs([*feed.finished((slot(1, 2),))]) == [(1, 0, 1, 2)]
    feed, logs = feed_of()
    computed(logs, slot(0, 90))
    feed.unsent(first)
    assert sum(p.end - p.start for p in feed.finished((slot(0, 90),)) if p.member == 1) == WINDOW


def test_answers_are_sent_in_order_as_far_as_the_budget_goes() -> None:
    """The older question first, from where the last answer ended."""
    feed, logs = feed_of()
    computed(logs, slot(0, 30))
    feed.ask(2, question(5, 17, unit=1))
    feed.ask(1, question(0, 10))
    assert runs([*feed.answers(1)]) == [(2, 1, 5, 13)]
    assert [*feed.answers(0)] == []
    assert runs([*feed.answers(12 * ROW)]) == [(2, 1, 13, 17), (1, 0, 0, 8)]
    assert runs([*feed.answers(99 * ROW)]) == [(1, 0, 8, 10)]
    assert [*feed.answers(99 * ROW)] == []


def test_answers_use_up_the_same_credit() -> None:
    """Without credit a question waits, and the questions of others do not."""
    feed, logs = feed_of(credit=8)
    computed(logs, slot(0, 30))
    feed.ask(1, question(0, 20))
    feed.ask(2, question(0, 4, unit=1))
    assert runs([*feed.answers(99 * ROW)]) == [(1, 0, 0, 8), (2, 1, 0, 4)]
    feed.grant(1, Credit(fence=FENCE, bytes=12 * ROW))
    assert runs([*feed.answers(99 * ROW)]) == [(1, 0, 8, 16), (1, 0, 16, 20)]


def test_an_answer_ends_with_what_is_covered() -> None:
    """What is computed next follows by itself, and only what is computed while an answer is on its
    way goes with it: it would not join before."""
    feed, logs = feed_of()
    computed(logs, slot(0, 10))
    feed.ask(1, question(0, 14))
    assert runs([*feed.answers(1)]) == [(1, 0, 0, 8)]
    computed(logs, slot(10, 12))
    assert runs([*feed.finished((slot(10, 12),))]) == [(2, 1, 10, 12), (1, 1, 10, 12)]
    assert runs([*feed.answers(99 * ROW)]) == [(1, 0, 8, 12)]
    computed(logs, slot(12, 13))
    assert (1, 0, 12, 13) in runs([*feed.finished((slot(12, 13),))])
    assert [*feed.answers(99 * ROW)] == []


def test_an_answer_is_as_long_as_its_credit() -> None:
    """Whatever the positions that were asked for."""
    feed, logs = feed_of()
    computed(logs, slot(0, 30))
    feed.ask(1, question(3, 1 << 20, credit=5 * ROW - 1))
    assert runs([*feed.answers(99 * ROW)]) == [(1, 0, 3, 7)]
    feed.ask(1, question(3, 9, credit=ROW - 1))
    assert [*feed.answers(99 * ROW)] == []


def test_a_newer_question_takes_the_place_of_the_older() -> None:
    """Also one to which there is nothing to say."""
    feed, logs = feed_of()
    computed(logs, slot(0, 10))
    feed.ask(1, question(0, 10))
    feed.ask(1, question(6, 9))
    assert runs([*feed.answers(99 * ROW)]) == [(1, 0, 6, 9)]
    feed.ask(1, question(0, 10))
    feed.ask(1, question(10, 12))
    feed.ask(1, question(0, 3, request_id=9))
    assert [*feed.answers(99 * ROW)] == []


def test_what_is_void_by_now_is_not_answered() -> None:
    """A question about a request that has ended since, or begins anew, is over."""
    feed, logs = feed_of()
    computed(logs, slot(0, 20))
    feed.ask(1, question(4, 20))
    logs.forget((1,))
    assert [*feed.answers(99 * ROW)] == []
    computed(logs, slot(0, 20))
    assert [*feed.answers(99 * ROW)] == []


@pytest.mark.parametrize(
    ("sender", "wrong"), [(1, {"stage": 1}), (1, {"unit": 2}), (1, {"unit": 99}), (2, {}), (3, {})]
)
def test_only_a_standby_of_the_unit_may_ask(sender: int, wrong: dict[str, int]) -> None:
    """Whatever a member says that the plan does not let it ask is refused."""
    feed, logs = feed_of()
    computed(logs, slot(0, 10))
    with pytest.raises(RemoteProtocolError):
        feed.ask(sender, question(0, 10, **wrong))
    assert [*feed.answers(99 * ROW)] == []


def test_a_link_that_begins_anew_has_neither_credit_nor_questions() -> None:
    """The standby grants and asks again; those of others stay."""
    feed, logs = feed_of()
    computed(logs, slot(0, 4))
    feed.ask(1, question(0, 4))
    feed.ask(2, question(0, 4, unit=1))
    feed.relinked(1)
    assert runs([*feed.answers(99 * ROW)]) == [(2, 1, 0, 4)]
    computed(logs, slot(4, 5))
    assert runs([*feed.finished((slot(4, 5),))]) == [(2, 1, 4, 5)]


def test_answers_may_lose_their_link_while_they_are_sent() -> None:
    """What was asked on it is over at once."""
    feed, logs = feed_of()
    computed(logs, slot(0, 20))
    feed.ask(1, question(0, 20))
    answers = feed.answers(99 * ROW)
    assert next(answers).end == 8
    feed.relinked(1)
    assert [*answers] == []


# --- the standby ----------------------------------------------------------------------------------


def test_a_frame_that_joins_is_written() -> None:
    """From the watermark on, or before it; that counts as covered then."""
    replicas, logs = replicas_of()
    logs.write(FENCE, slot(0, 10))
    assert take(replicas, frame(logs, 0, 4), 1.0)
    assert take(replicas, frame(logs, 2, 7), 1.0)
    assert (logs.coverage.of(1, UNITS[0]), logs.coverage.of(1, UNITS[1])) == (7, 0)


def test_a_frame_of_other_tokens_is_not_written() -> None:
    """Nor one of a request, or of positions, whose tokens are not here (yet)."""
    replicas, logs = replicas_of()
    logs.write(FENCE, slot(0, 4))
    for wrong in (
        frame(logs, 0, 4, log_digest="ab" * 32),
        frame(logs, 0, 4, request_id=2),
        frame(logs, 0, 5),
    ):
        assert not take(replicas, wrong, 1.0)
    assert logs.coverage.of(1, UNITS[0]) == 0


@pytest.mark.parametrize(
    ("sender", "wrong"),
    [
        (2, {}),
        (0, {"stage": 1}),
        (0, {"unit": 2}),
        (0, {"unit": 9}),
        (0, {"tensor": Tensor(WireDType.FLOAT32, (1, 2, 4, 4), bytes(128))}),
        (0, {"tensor": Tensor(WireDType.FLOAT32, (2, 2, 4, 5), bytes(320))}),
    ],
)
def test_only_the_owner_may_send_and_what_the_plan_says(
    sender: int, wrong: dict[str, object]
) -> None:
    """A frame of another's unit, or of another shape, is refused before it is looked at."""
    replicas, logs = replicas_of()
    logs.write(FENCE, slot(0, 4))
    assert replicas.unit_of(0, frame(logs, 0, 4)) == UNITS[0]
    with pytest.raises(RemoteProtocolError):
        replicas.unit_of(sender, frame(logs, 0, 4, **wrong))


def test_a_standby_that_lags_asks() -> None:
    """One step behind is nothing; when it has been for a while it asks each owner, once, and for
    some more than it knows of."""
    replicas, logs = replicas_of()
    logs.write(FENCE, slot(0, 10))
    replicas.stepped((slot(0, 10),), 1.0)
    assert (asked(replicas, 9.0), replicas.lacking) == ([], 0)
    logs.write(FENCE, slot(10, 11))
    replicas.stepped((slot(10, 11),), 10.0)
    assert replicas.lacking == 20
    assert asked(replicas, 10.0 + LAG_S - 0.01) == []
    assert asked(replicas, 10.0 + LAG_S) == [(0, 0, 0, 14), (0, 1, 0, 14)]
    assert asked(replicas, 10.0 + LAG_S) == []


def test_a_standby_that_keeps_up_does_not_ask() -> None:
    """What came in time is no lag, however long steps go on."""
    replicas, logs = replicas_of()
    for position in range(20):
        now = 0.15 * position
        logs.write(FENCE, slot(position, position + 1))
        replicas.stepped((slot(position, position + 1),), now)
        for unit in (0, 1):
            assert take(replicas, frame(logs, position, position + 1, unit), now + 0.01)
        assert asked(replicas, now + 0.14) == []
    assert replicas.lacking == 0


def test_a_standby_that_gets_on_does_not_ask() -> None:
    """Frames that are on their way when the next step begins are not missing: only when nothing
    more comes does it ask."""
    replicas, logs = replicas_of()
    for position in range(30):
        now = 0.15 * position
        logs.write(FENCE, slot(position, position + 1))
        replicas.stepped((slot(position, position + 1),), now)
        for unit in (0, 1) if position > 1 else ():
            assert take(replicas, frame(logs, position - 2, position - 1, unit), now + 0.01)
        assert asked(replicas, now + 0.02) == []
    assert replicas.lacking == 2
    assert asked(replicas, now + 0.01 + LAG_S - 0.001) == []
    assert asked(replicas, now + 0.01 + LAG_S + 0.001) == [(0, 0, 28, 33), (0, 1, 28, 33)]


def test_after_a_gap_frames_on_their_way_are_no_lag_either() -> None:
    """What was lost is asked for once, though frames still come two steps late."""
    replicas, logs = replicas_of()
    questions: list[tuple[int, int, int, int]] = []
    for position in range(40):
        now = 0.03 * position
        logs.write(FENCE, slot(position, position + 1))
        replicas.stepped((slot(position, position + 1),), now)
        for unit in (0, 1) if position > 1 and position != 10 else ():
            covered = logs.coverage.of(1, UNITS[unit])
            asked_for = any(question[1:3] == (unit, covered) for question in questions)
            start = covered if asked_for else position - 2
            take(replicas, frame(logs, start, position - 1, unit), now + 0.01)
        questions += asked(replicas, now + 0.02)
    assert [question[:3] for question in questions] == [(0, 0, 8), (0, 1, 8)]
    assert replicas.lacking == 2


def test_a_gap_is_asked_for_at_once() -> None:
    """A frame beyond the watermark proves that what is before it was lost."""
    replicas, logs = replicas_of()
    logs.write(FENCE, slot(0, 10))
    take(replicas, frame(logs, 0, 3), 1.0)
    assert not take(replicas, frame(logs, 5, 6), 1.0)
    assert asked(replicas, 1.0) == [(0, 0, 3, 3 + 1 + MORE)]


def test_a_question_is_over_when_what_was_known_is_there() -> None:
    """More than that may come, but need not."""
    replicas, logs = replicas_of()
    logs.write(FENCE, slot(0, 20))
    replicas.stepped((slot(10, 20),), 1.0)
    assert asked(replicas, 2.0) == [(0, 0, 0, 14), (0, 1, 0, 14)]
    take(replicas, frame(logs, 0, 10), 2.0)
    replicas.stepped((slot(15, 20),), 2.1)
    assert asked(replicas, 2.1) == []
    assert asked(replicas, 2.1 + LAG_S) == [(0, 0, 10, 19)]


def test_no_more_is_asked_of_an_owner_than_the_window() -> None:
    """Over all units and requests; the rest when some of it has come."""
    replicas, logs = replicas_of()
    logs.write(FENCE, slot(0, 90))
    replicas.stepped((slot(60, 90),), 1.0)
    assert asked(replicas, 2.0) == [(0, 0, 0, WINDOW)]
    take(replicas, frame(logs, 0, 8), 2.0)
    assert asked(replicas, 2.0) == [(0, 1, 0, 8)]
    take(replicas, frame(logs, 8, WINDOW), 2.0)
    assert asked(replicas, 2.0) == [(0, 0, WINDOW, WINDOW + 24)]


def test_an_answer_that_does_not_come_is_asked_for_again() -> None:
    """When nothing of it has come for a while; where nothing at all has, credit was lost too."""
    replicas, logs = replicas_of()
    logs.write(FENCE, slot(0, 20))
    assert [owner for owner, _ in replicas.grants()] == [0]
    replicas.stepped((slot(10, 20),), 1.0)
    assert len(asked(replicas, 2.0)) == 2
    assert take(replicas, frame(logs, 0, 4), 2.5)
    assert asked(replicas, 2.0 + ASK_AGAIN_S) == [(0, 1, 0, 14)]
    assert [*replicas.grants()] == []
    assert asked(replicas, 2.5 + ASK_AGAIN_S) == [(0, 0, 4, 14)]
    assert [*replicas.grants()] == []
    assert len(asked(replicas, 9.0)) == 2
    assert [*replicas.grants()] == [(0, Credit(fence=FENCE, bytes=WINDOW * ROW))]


def test_credit_is_a_window_at_first_and_then_what_was_used() -> None:
    """A quarter of the window at a time; what was of no use was sent all the same."""
    replicas, logs = replicas_of()
    logs.write(FENCE, slot(0, 20))
    assert [*replicas.grants()] == [(0, Credit(fence=FENCE, bytes=WINDOW * ROW))]
    take(replicas, frame(logs, 0, 4), 1.0)
    take(replicas, frame(logs, 9, 12), 1.0)
    assert [*replicas.grants()] == []
    take(replicas, frame(logs, 0, 1, log_digest="ab" * 32), 1.0)
    assert [*replicas.grants()] == [(0, Credit(fence=FENCE, bytes=8 * ROW))]
    assert [*replicas.grants()] == []


def test_credit_that_a_link_does_not_take_is_granted_again() -> None:
    """With what is used meanwhile, but never more than a window at once."""
    replicas, logs = replicas_of()
    logs.write(FENCE, slot(0, 20))
    ((owner, window),) = replicas.grants()
    replicas.ungranted(owner, window)
    take(replicas, frame(logs, 0, 4), 1.0)
    assert [*replicas.grants()] == [(0, window)]
    take(replicas, frame(logs, 4, 8), 1.0)
    ((owner, used),) = replicas.grants()
    assert used.bytes == 8 * ROW
    replicas.ungranted(owner, used)
    assert [*replicas.grants()] == [(0, used)]
    assert [*replicas.grants()] == []


def test_a_member_that_keeps_nothing_grants_nothing() -> None:
    """It has no owners to speak with."""
    replicas, logs = replicas_of(3)
    logs.write(FENCE, slot(0, 9))
    replicas.stepped((slot(5, 9),), 1.0)
    assert (replicas.owners, [*replicas.grants()], [*replicas.asks(9.0)]) == (frozenset(), [], [])


def test_an_owners_new_link_is_granted_and_asked_anew() -> None:
    """What the old one held is lost; other members' links change nothing."""
    replicas, logs = replicas_of()
    logs.write(FENCE, slot(0, 20))
    assert len([*replicas.grants()]) == 1
    take(replicas, frame(logs, 0, 7), 1.0)
    replicas.stepped((slot(10, 20),), 1.0)
    assert len(asked(replicas, 2.0)) == 2
    replicas.relinked(2)
    assert (asked(replicas, 2.0), [*replicas.grants()]) == ([], [])
    replicas.relinked(0)
    assert len(asked(replicas, 2.0)) == 2
    assert [*replicas.grants()] == [(0, Credit(fence=FENCE, bytes=WINDOW * ROW))]
    take(replicas, frame(logs, 0, 1), 1.0)
    assert [*replicas.grants()] == []


def test_nothing_is_asked_of_a_request_that_ended() -> None:
    """Its id may be used again, and lacks what is expected then."""
    replicas, logs = replicas_of()
    logs.write(FENCE, slot(0, 20))
    replicas.stepped((slot(10, 20),), 1.0)
    assert len(asked(replicas, 2.0)) == 2
    logs.forget((1,))
    replicas.forget((1, 7))
    assert (asked(replicas, 9.0), replicas.lacking) == ([], 0)
    logs.write(FENCE, slot(0, 20))
    replicas.stepped((slot(3, 20),), 9.0)
    assert asked(replicas, 9.5) == [(0, 0, 0, 7), (0, 1, 0, 7)]


def test_a_slot_before_the_watermark_makes_what_follows_void() -> None:
    """What is computed again is sent again, and joins where it begins."""
    replicas, logs = replicas_of()
    logs.write(FENCE, slot(0, 20))
    take(replicas, frame(logs, 0, 20), 1.0)
    again = slot(12, 16)
    logs.write(FENCE, again)
    replicas.stepped((again,), 2.0)
    assert logs.coverage.of(1, UNITS[0]) == 12
    assert asked(replicas, 3.0) == [(0, 1, 0, 12 + MORE)]
    assert take(replicas, frame(logs, 12, 16), 3.0)
    assert logs.coverage.of(1, UNITS[0]) == 16
