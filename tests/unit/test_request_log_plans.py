"""What a new plan, or a new leader, does to requests, and what their clients are told."""

from __future__ import annotations

import pytest

from p2pinfer.core import events as e
from p2pinfer.core.agreement import Agreed
from p2pinfer.core.request_log import MAX_KEPT_REPLIES, REPLY_KEPT_S
from p2pinfer.limits import MAX_FAILOVERS, MAX_NODES
from p2pinfer.types import SamplingParams
from p2pinfer.wire import messages as m
from tests.request_bench import OTHER, Ledger, agreed, started

# --- a new plan -----------------------------------------------------------------------------------


def test_a_new_plan_starts_all_requests_anew() -> None:
    """From where the KV is right; tokens that were drawn but not committed are forced."""
    ledger = Ledger().forward().started().committed(0, 10).forward(request_id=2)
    ledger.adopt(agreed(10, 11, restart=3))
    assert started(ledger.start()) == [(1, (10, 11), 3), (2, (), 0)]
    assert ledger.drawn() == []


def test_what_was_agreed_is_sent_when_it_is_committed() -> None:
    """Under the new plan, by its first commit: before that another leader might know nothing of
    it."""
    ledger = Ledger().forward().started().committed(0, 10).adopt(agreed(10, 11, 12)).started()
    ledger.forward(received=(10,))
    assert ledger.drawn() == []
    assert ledger.settled().drawn() == [(OTHER, [(1, 11), (2, 12)])]
    assert ledger.settled().drawn() == []


def test_a_token_commits_all_before_it() -> None:
    """A commit of a later token may be told of first."""
    ledger = Ledger().forward().started().adopt(agreed(10, 11)).started().committed(2, 12)
    assert ledger.drawn() == [(OTHER, [(0, 10), (1, 11), (2, 12)])]


def test_a_plan_may_be_settled_before_requests_may_start() -> None:
    """The worker's word is kept until this node knows that the plan is in force."""
    ledger = Ledger().forward().started().adopt(agreed(10)).settled()
    assert ledger.drawn() == []
    ledger.log.start_all(ledger.fence)
    assert ledger.drawn() == [(OTHER, [(0, 10)])]


def test_a_log_that_was_complete_ends_when_it_is_committed() -> None:
    """The worker sees at once that nothing is left to draw; the last tokens are committed later."""
    ledger = Ledger().forward().started().adopt(agreed(10, 11)).started().ended(2, now=3.0)
    assert ledger.take() == ([], [])
    sent = ledger.settled().sent()
    assert [type(message) for _, message in sent] == [m.Drawn, m.Ended]
    assert ledger.log.deadline == 3.0 + REPLY_KEPT_S


def test_a_complete_log_that_the_client_has_ends_at_once() -> None:
    """There is nothing to commit that it has not been shown."""
    ledger = Ledger().forward(received=(10, 11)).started().ended(2)
    assert [type(message) for _, message in ledger.sent()] == [m.Ended]


def test_a_complete_log_that_is_extended_is_started_again() -> None:
    """The end that was waiting is void: the worker will say what is wrong with those tokens."""
    ledger = Ledger().forward().started().adopt(agreed(10)).started().ended(1)
    assert ledger.forward(received=(10, 11)).orders() == [e.CancelRequest(request_id=1)]
    assert ledger.settled().take() == ([], [])
    ledger.started().ended(1)
    assert [message.code for _, message in ledger.sent()] == ["log_conflict"]


def test_a_waiting_end_does_not_outlive_its_plan() -> None:
    """Under the next plan the worker sees again that the log is complete."""
    ledger = Ledger().forward().started().adopt(agreed(10)).started().ended(1)
    ledger.adopt(agreed(10)).started().settled()
    assert [type(message) for _, message in ledger.sent()] == [m.Drawn]
    assert [type(message) for _, message in ledger.ended(1).sent()] == [m.Ended]


@pytest.mark.parametrize(
    ("log", "restart"),
    [
        (agreed(restart=1), 1),
        (agreed(10, restart=3), 3),
        (agreed(10, 99, 98, restart=4), 3),
        (agreed(10, 99, 98, restart=2), 2),
        (agreed(params=SamplingParams(seed=1), restart=2), 0),
    ],
)
def test_committed_tokens_are_never_lost(log: Agreed, restart: int) -> None:
    """Whatever is agreed on, what this leader knows as committed stays; computing begins where
    both logs are still the same."""
    ledger = Ledger().forward().started().committed(0, 10, 11).adopt(log)
    assert started(ledger.start()) == [(1, (10, 11), restart)]


def test_the_last_known_token_is_always_computed() -> None:
    """Its logits are those that the next token is drawn from."""
    ledger = Ledger().forward().started().adopt(agreed(10, restart=9))
    assert started(ledger.start()) == [(1, (10,), 2)]


def test_a_log_that_nobody_has_begins_at_0() -> None:
    """No plan before left KV that could be counted on."""
    ledger = Ledger().forward().started().committed(0, 10).adopt(agreed(10, restart=1)).adopt()
    assert started(ledger.start()) == [(1, (10,), 0)]


def test_tokens_that_a_client_brought_meanwhile_stay() -> None:
    """A request that was forwarded to a new leader before the logs were agreed on keeps what is
    longer; the shared beginning is not computed again."""
    ledger = Ledger().forward(received=(10, 11)).adopt(agreed(10, restart=2))
    assert started(ledger.start()) == [(1, (10, 11), 2)]
    ledger = Ledger().forward(received=(10,)).adopt(agreed(10, 11, restart=2)).started()
    assert ledger.settled().drawn() == [(OTHER, [(1, 11)])]


@pytest.mark.parametrize("log", [agreed(10, 99), agreed(10, params=SamplingParams(seed=1))])
def test_a_request_that_came_before_the_logs_may_contradict_them(log: Agreed) -> None:
    """It ends in log_conflict, as it would have later, and the agreed log is kept for its owner."""
    ledger = Ledger().forward(received=(10, 11)).adopt(log, now=5.0)
    [(to, ended)] = ledger.sent()
    assert (to, ended.code, ended.retryable) == (OTHER, "log_conflict", False)
    assert ledger.log.deadline == 15.0
    assert ledger.start() == []


def test_a_cancelled_request_does_not_come_back_with_the_logs() -> None:
    """It is not wanted; where its log came all the same, the members are told to forget it."""
    ledger = Ledger().forward().started().cancel()
    assert not ledger.log.wants(1)
    assert ledger.adopt(agreed(10)).start() == [e.CancelRequest(request_id=1)]
    assert ledger.log.running == 0


def test_a_request_may_be_cancelled_before_its_log_is_known() -> None:
    """A new leader remembers it, unless only the client's connection is gone."""
    ledger = Ledger().cancel().cancel(request_id=2, reason="orphan")
    assert (ledger.log.wants(1), ledger.log.wants(2)) == (False, True)


def test_a_request_may_be_cancelled_between_two_plans() -> None:
    """The worker is told when it obeys again, since it stops to listen in between."""
    ledger = Ledger().forward().started().adopt(agreed(10)).cancel()
    assert ledger.orders() == []
    assert ledger.start() == [e.CancelRequest(request_id=1)]


def test_an_id_may_be_used_again() -> None:
    """What members have of the cancelled request is not taken for the new one."""
    ledger = Ledger().forward().started().cancel().forward(prompt_ids=(3,))
    assert not ledger.log.wants(1)
    assert started(ledger.adopt(agreed(10)).start()) == [(1, (), 0)]


def test_remembered_ids_are_bounded() -> None:
    """The oldest of the requests that were removed is forgotten."""
    ledger = Ledger()
    for number in range(MAX_KEPT_REPLIES + 1):
        ledger.cancel(request_id=number)
    assert (ledger.log.wants(0), ledger.log.wants(1)) == (True, False)


def test_an_ended_request_is_left_alone() -> None:
    """Its reply is kept, whatever members still have of it."""
    ledger = Ledger().forward().started().committed(0, 10).ended(1).adopt(agreed(10), lost=("n2",))
    assert ledger.start() == [e.CancelRequest(request_id=1)]
    sent = ledger.forward().sent()
    assert [type(message) for _, message in sent] == [m.Drawn, m.Ended]


# --- a new leader ---------------------------------------------------------------------------------


def test_a_taken_over_request_waits_for_its_claim() -> None:
    """It is started when a serving node forwards it; then the client gets what it lacks, once that
    is committed."""
    ledger = Ledger().adopt(agreed(10, 11, restart=2), now=1.0)
    assert (ledger.start(), ledger.log.deadline, ledger.log.running) == ([], 11.0, 1)
    ledger.settled().forward(2.0, received=(10,))
    assert ledger.drawn() == [(OTHER, [(1, 11)])]
    assert started(ledger.start()) == [(1, (10, 11), 2)]


def test_taken_over_requests_are_ordered_by_their_ids() -> None:
    """All that are claimed when the plan is in force start in the same order on any leader."""
    ledger = Ledger().adopt(agreed(request_id=5), agreed(request_id=2))
    ledger.forward(request_id=5).forward(request_id=2)
    assert [request_id for request_id, _, _ in started(ledger.start())] == [2, 5]


def test_a_claim_with_more_tokens_extends_the_log() -> None:
    """The KV of the shared beginning is right, so computing begins there."""
    ledger = Ledger().adopt(agreed(10, restart=2)).started().forward(received=(10, 11, 12))
    assert started(ledger.start()) == [(1, (10, 11, 12), 2)]


def test_a_claim_with_a_wrong_token_is_a_log_conflict() -> None:
    """The log stays for its true client, and is forgotten when none comes."""
    ledger = Ledger().adopt(agreed(10)).started().forward(1.0, received=(99,))
    assert [message.code for _, message in ledger.sent()] == ["log_conflict"]
    ledger.log.look(10.0)
    assert ledger.orders() == [e.CancelRequest(request_id=1)]


def test_a_log_may_end_in_the_middle_of_its_prompt() -> None:
    """It waits for the claim, which brings the rest; a prompt that begins otherwise is refused."""
    part = agreed(prompt=(7, 8), prompt_tokens=4, restart=2)
    ledger = Ledger().adopt(part).started()
    for prompt in ((7, 9, 1, 2), (7, 8, 1)):
        [(_, ended)] = ledger.forward(prompt_ids=prompt).sent()
        assert ended.code == "log_conflict"
    orders = ledger.forward(prompt_ids=(7, 8, 1, 2)).start()
    assert [(o.prompt_ids, o.received, o.computed) for o in orders] == [((7, 8, 1, 2), (), 1)]
    ledger = Ledger().forward(prompt_ids=(7, 8, 1, 2)).adopt(part)
    assert [(o.prompt_ids, o.computed) for o in ledger.start()] == [((7, 8, 1, 2), 2)]


def test_an_unclaimed_log_grows_with_the_next_plan() -> None:
    """A member that was out of reach may have a longer one."""
    ledger = Ledger().adopt(agreed(prompt=(7,))).adopt(agreed(10, restart=2))
    assert started(ledger.started().forward().start()) == [(1, (10,), 2)]


# --- interruptions --------------------------------------------------------------------------------


def told(ledger: Ledger) -> list[tuple[int, tuple[str, ...], str, float, bool]]:
    """Interruptions in the messages sent."""
    return [
        (
            i.failover.position,
            i.failover.lost,
            i.failover.rung,
            i.failover.detect_s,
            i.failover.exact,
        )
        for _, message in ledger.sent()
        if isinstance(message, m.Drawn)
        for i in message.interruptions
    ]


def test_an_interruption_goes_with_the_first_token_after_it() -> None:
    """To the clients of requests that were running; one more is told of those lost since."""
    ledger = Ledger().forward().started().committed(0, 10).forward(request_id=2)
    ledger.adopt(agreed(10), lost=("n2", "n2")).started()
    assert told(ledger.forward()) == []
    assert told(ledger.committed(1, 11)) == [(3, ("n2",), "replay", 0.5, True)]
    assert told(ledger.committed(2, 12).committed(0, 5, request_id=2)) == []
    ledger.adopt(agreed(10, 11, 12, restart=4), lost=("n3",), exact=False).started()
    assert told(ledger.committed(3, 13)) == [(5, ("n3",), "none", 0.5, False)]


def test_an_interruption_tells_how_the_kv_came_back() -> None:
    """As it was agreed on, but where nothing of the KV is of use everything is computed again."""
    ledger = Ledger().forward().started().committed(0, 10)
    ledger.adopt(agreed(10, restart=2, rung="replica"), lost=("n2",)).started()
    assert [rung for _, _, rung, *_ in told(ledger.committed(1, 11))] == ["replica"]
    other = agreed(10, 11, restart=2, rung="replica", params=SamplingParams(seed=1))
    ledger.adopt(other, lost=("n3",)).started()
    assert [rung for _, _, rung, *_ in told(ledger.committed(2, 12))] == ["replay"]


def test_a_lost_message_takes_no_interruption_with_it() -> None:
    """It goes again with the token that it belongs to, and not to a node that has that token."""
    ledger = Ledger().forward().started().committed(0, 10)
    ledger.adopt(agreed(10), lost=("n2",)).started().committed(1, 11).take()
    assert [position for position, *_ in told(ledger.forward(received=(10,)))] == [3]
    assert told(ledger.forward(received=(10, 11))) == []


def test_only_lost_members_are_told() -> None:
    """A change of plan for another reason is no interruption that a client need know of."""
    ledger = Ledger().forward().started().adopt(agreed()).started()
    assert told(ledger.committed(0, 10)) == []


def test_two_interruptions_without_a_token_between_are_one() -> None:
    """The client sees one pause; all that were lost in it are named, up to MAX_NODES."""
    ledger = Ledger().forward().started().adopt(agreed(), lost=("n2",), exact=False)
    ledger.adopt(agreed(restart=1), lost=("n3", "n2"), detect_s=0.7).started()
    assert told(ledger.committed(0, 10)) == [(2, ("n2", "n3"), "replay", 0.7, False)]
    ledger.adopt(agreed(10), lost=tuple(f"n{n}" for n in range(MAX_NODES + 2))).started()
    [(_, lost, *_)] = told(ledger.committed(1, 11))
    assert len(lost) == MAX_NODES


def test_a_new_leader_learns_from_the_claim_where_a_reply_was_interrupted() -> None:
    """The log may be longer than what the client had."""
    ledger = Ledger().adopt(agreed(10, 11), lost=("n1",)).started().settled()
    ledger.adopt(agreed(10, 11), lost=("n2",)).started().settled().forward(received=(10,))
    assert told(ledger) == [(3, ("n1", "n2"), "replay", 0.5, True)]


@pytest.mark.parametrize("rungs", [("replica", "none"), ("none", "replica")])
def test_of_two_interruptions_the_costlier_rung_is_told(rungs: tuple[str, str]) -> None:
    """Replicas were taken, whether the plan before or after it moved nothing."""
    ledger = Ledger().forward().started()
    for name, rung in zip(("n2", "n3"), rungs, strict=True):
        ledger.adopt(agreed(restart=1, rung=rung), lost=(name,))
    ledger.started()
    assert told(ledger.committed(0, 10)) == [(2, ("n2", "n3"), "replica", 0.5, True)]


def test_remembered_interruptions_are_bounded() -> None:
    """Those that a reply's last message has no room for are forgotten, the oldest first."""
    ledger = Ledger().forward().started()
    for index in range(MAX_FAILOVERS + 1):
        tokens = (9,) * index
        ledger.adopt(agreed(*tokens), lost=("n2",)).started().committed(index, 9)
    ledger.take()
    assert len(told(ledger.forward())) == MAX_FAILOVERS
