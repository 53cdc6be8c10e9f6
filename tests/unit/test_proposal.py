"""How the leader brings one plan into force: ACKs, agreed logs, ACTIVATE, and sending again."""

from __future__ import annotations

from msgspec.structs import replace

from p2pinfer.core import events as e
from p2pinfer.core.agreement import Agreed, digest
from p2pinfer.types import Fence
from p2pinfer.wire import messages as m
from tests.plan_bench import Office, log, member, plan_of


def office(count: int = 3) -> Office:
    """A leader that has proposed its first plan to `count` members."""
    bench = Office(count)
    bench.look()
    bench.told(e.PlanProposed)
    return bench


def entry(bench: Office, text: str, *, sender: int, start: int = 0, request_id: int = 1) -> None:
    """A member sends a log that was asked for."""
    whole = log(text, request_id=request_id)
    answer = m.LogEntry(
        fence=bench.plan.fence,
        request_id=request_id,
        term=whole.term,
        prompt_tokens=1,
        params=whole.params,
        start=start,
        tokens=whole.tokens[start:],
    )
    bench.maker.log_entry(answer, member(sender).node_id, bench.now)


def test_every_member_gets_the_proposal() -> None:
    """The leader's own node too."""
    bench = office()
    assert [number for number, _ in bench.sent(m.Propose)] == [1, 2, 3]


def test_a_plan_needs_every_owner() -> None:
    """With one owner's ACK missing nothing comes into force, however long it takes."""
    bench = office()
    bench.ack(1, 2)
    bench.look(100.0)
    assert not bench.maker.activated
    assert bench.maker.waiting == "node3 to load the weights"
    bench.ack(3)
    assert bench.maker.activated


def test_a_plan_needs_a_quorum_of_voters() -> None:
    """Owners alone do not suffice where voters that own nothing are too many."""
    bench = Office(1)
    for number in (2, 3):
        bench.members[number] = member(number, witness=True, numeric_class="")
    plan = bench.served()
    assert (bench.owners(), bench.voters()) == ({1}, {1, 2, 3})
    later = Office(1, base=plan, term=2)
    later.members.update(bench.members)
    later.look()
    later.ack(1)
    later.look(100.0)
    assert not later.maker.activated
    later.ack(2)
    later.look()
    later.look(1.0)
    assert later.maker.activated


def test_members_that_own_nothing_are_waited_for_a_little() -> None:
    """Once all that must have answered, the others have `straggle` to take part."""
    bench = Office(2, base=plan_of(2), term=7)
    bench.members[3] = member(3, weight=0.0)
    bench.look()
    bench.ack(1, 2)
    assert not bench.maker.activated
    assert bench.maker.deadline <= bench.now + bench.config.timing.straggle
    bench.look(0.5)
    assert not bench.maker.activated
    bench.look(0.5)
    assert bench.maker.activated
    assert bench.maker.listeners == (0, 1)


def test_all_that_can_listen_do() -> None:
    """Whoever acknowledges before the activation takes part."""
    bench = Office(2)
    bench.members[3] = member(3, weight=0.0)
    bench.look()
    bench.adopt(1, 2, 3)
    assert bench.maker.listeners == (0, 1, 2)


def test_the_leaders_logs_are_asked_for_on_its_own_node() -> None:
    """Of equal logs the leader's are read; that costs no message on the wire."""
    bench = office()
    bench.ack(1, 2, 3, logs={n: [log("abc")] for n in (1, 2, 3)})
    assert bench.sent(m.LogRequest) == [
        (1, m.LogRequest(fence=bench.plan.fence, request_ids=(1,))),
    ]
    assert not bench.maker.activated


def test_better_logs_are_fetched_from_their_holders() -> None:
    """One request per holder, for all logs that it has best."""
    bench = office()
    theirs = [log("abcd"), log("xyz", request_id=2)]
    bench.ack(1, 2, 3, logs={1: [log("ab")], 2: theirs, 3: [log("q", request_id=3)]})
    assert bench.sent(m.LogRequest) == [
        (2, m.LogRequest(fence=bench.plan.fence, request_ids=(1, 2))),
        (3, m.LogRequest(fence=bench.plan.fence, request_ids=(3,))),
    ]
    entry(bench, "abcd", sender=2)
    entry(bench, "q", sender=3, request_id=3)
    assert not bench.maker.activated
    entry(bench, "xyz", sender=2, request_id=2)
    assert bench.maker.activated
    (agreed, lost, detect_s, exact) = bench.requests.adopted[-1]
    assert [each.log.tokens for each in agreed] == [
        log("abcd").tokens,
        log("xyz").tokens,
        log("q").tokens,
    ]
    assert (lost, detect_s, exact) == ((), 0.0, True)


def test_members_get_what_they_lack_before_activate() -> None:
    """Tails to who has a beginning, all to who has other tokens, nothing to who has it all."""
    bench = office()
    bench.ack(1, 2, 3, logs={1: [log("ab")], 2: [log("abcd")], 3: [log("xyz")]})
    entry(bench, "abcd", sender=2)
    tails = bench.sent(m.LogEntry)
    assert [(number, tail.start) for number, tail in tails] == [(1, 2), (3, 0)]
    assert [tail.tokens for _, tail in tails] == [log("cd").tokens, log("abcd").tokens]
    agreed = m.AgreedLog(request_id=1, length=4, digest=digest(log("abcd").tokens), restart=0)
    activate = m.Activate(fence=bench.plan.fence, logs=(agreed,))
    assert bench.sent(m.Activate) == [(1, activate), (2, activate), (3, activate)]


def test_restart_positions_are_those_of_the_acks() -> None:
    """What all owners have the KV of is not computed again, and the fact tells it."""
    bench = office()
    bench.ack(1, 2, 3, logs={1: [log("abcd")], 2: [log("abc")], 3: [log("abcd")]})
    entry(bench, "abcd", sender=1)
    (agreed, *_) = bench.requests.adopted[-1]
    assert agreed == (Agreed(request_id=1, log=log("abcd", term=1), restart=3, rung="none"),)
    assert bench.told(e.RequestRestored) == [
        e.RequestRestored(request_id=1, length=4, restart=3, rung="none")
    ]


def test_inputs_make_up_for_lost_kv() -> None:
    """ACTIVATE says of how many positions, and the fact names the rung."""
    bench = office()
    text = "abcdefghijklmnop"
    bench.ack(1, 2, 3, logs={number: [log(text)] for number in (1, 2, 3)}, covered=3, inputs=14)
    entry(bench, text, sender=1)
    (agreed, *_) = bench.requests.adopted[-1]
    assert [(each.restart, each.recompute, each.rung) for each in agreed] == [(14, 11, "recompute")]
    (activate, *_) = [message for _, message in bench.sent(m.Activate)]
    assert [(each.restart, each.recompute) for each in activate.logs] == [(14, 11)]


def test_replay_is_told_where_nothing_was_covered() -> None:
    """A request that begins anew is replayed."""
    bench = office()
    bench.ack(1, 2, 3, logs={1: [log("abcd")]})
    entry(bench, "abcd", sender=1)
    (fact,) = bench.told(e.RequestRestored)
    assert (fact.restart, fact.rung) == (0, "replay")


def test_a_unit_that_goes_to_its_standby_keeps_its_replica() -> None:
    """Its KV is where it was kept, as far as the standby says; others keep their own."""
    bench = Office(3, replicas=1)
    bench.served()
    bench.lose(3)
    bench.look()
    bench.told(e.RequestRestored)
    acks = {1: [log("abcd")], 2: [log("ab")]}
    bench.ack(1, 2, logs=acks)
    entry(bench, "abcd", sender=1)
    assert bench.told(e.RequestRestored) == [
        e.RequestRestored(request_id=1, length=4, restart=2, rung="replica")
    ]


def test_unwanted_logs_are_left_out() -> None:
    """What has ended or was cancelled on the leader is forgotten by everybody."""
    bench = office()
    bench.requests.unwanted.add(1)
    bench.ack(1, 2, 3, logs={1: [log("abcd")], 2: [log("abcd")]})
    assert bench.maker.activated
    assert not bench.sent(m.LogRequest)
    assert [message.logs for _, message in bench.sent(m.Activate)] == [(), (), ()]


def test_only_the_log_that_was_asked_for_is_taken() -> None:
    """Another sender, fence, start or content is ignored."""
    bench = office()
    bench.ack(1, 2, 3, logs={2: [log("abcd")]})
    entry(bench, "abcd", sender=3)
    entry(bench, "abcx", sender=2)
    entry(bench, "abcd", sender=2, start=1)
    entry(bench, "abcd", sender=2, request_id=9)
    bench.maker.log_entry(
        m.LogEntry(
            fence=Fence(9, 9),
            request_id=1,
            term=1,
            prompt_tokens=1,
            params=log("a").params,
            tokens=log("abcd").tokens,
        ),
        member(2).node_id,
        bench.now,
    )
    assert not bench.maker.activated
    entry(bench, "abcd", sender=2)
    assert bench.maker.activated


def test_what_has_no_answer_is_sent_again() -> None:
    """PROPOSE to those that have not answered, LOG_REQUEST to those that hold what lacks."""
    bench = office()
    bench.sent(m.Propose)
    bench.ack(1)
    bench.look(0.25)
    assert [number for number, _ in bench.sent(m.Propose)] == [2, 3]
    bench.ack(2, 3, logs={2: [log("abcd")]})
    assert len(bench.sent(m.LogRequest)) == 1
    bench.look(0.1)
    assert not bench.sent(m.LogRequest)
    bench.look(0.25)
    assert [number for number, _ in bench.sent(m.LogRequest)] == [2]
    assert not bench.sent(m.Propose)


def test_a_voter_that_turns_up_when_all_is_done_gets_the_proposal() -> None:
    """It was listed for its vote only; sending begins again for it alone."""
    before = Office(3)
    bench = Office(2, base=before.served(), base_active=False, term=2)
    bench.look(lost={3})
    bench.adopt(1, 2)
    bench.look(suspects=("node2",))
    bench.sent(m.Propose)
    bench.join(3)
    bench.look(0.1)
    assert not bench.sent(m.Propose)
    bench.look(0.25)
    assert [number for number, _ in bench.sent(m.Propose)] == [3]


def test_activate_is_sent_again_until_the_member_obeys() -> None:
    """With what the member lacks; its heartbeat says when it is enough. The leader obeys itself."""
    bench = Office(2, base=plan_of(2), term=7)
    bench.look()
    bench.ack(1, 2, logs={1: [log("ab")]})
    entry(bench, "ab", sender=1)
    for kind in (m.Activate, m.LogEntry):
        bench.sent(kind)
    bench.look(0.25)
    assert [number for number, _ in bench.sent(m.LogEntry)] == [2]
    assert [number for number, _ in bench.sent(m.Activate)] == [2]
    bench.obey(2)
    bench.look(0.25)
    assert not bench.sent(m.Activate)


def test_nothing_is_left_to_do_when_all_obey() -> None:
    """A plan that all obey asks for no more looks."""
    bench = Office(1)
    bench.served()
    bench.look(1.0)
    bench.look(1.0)
    assert bench.maker.deadline == float("inf")


def test_an_ack_of_a_member_that_was_lost_does_not_count() -> None:
    """It may come back without what it acknowledged."""
    bench = Office(2)
    bench.look()
    bench.ack(2)
    bench.maker.lost(member(2), 0.7)
    bench.ack(1)
    assert not bench.maker.activated


def test_a_late_ack_is_noted_for_the_next_plan() -> None:
    """Who acknowledges when the plan is in force takes no part in it."""
    bench = Office(2, base=plan_of(2), term=7)
    bench.members[3] = member(3, weight=0.0)
    bench.look()
    bench.ack(1, 2)
    bench.look(0.0)
    bench.look(1.0)
    assert bench.maker.listeners == (0, 1)
    assert not bench.maker.has_acked(member(3))
    late = m.Ack(fence=bench.plan.fence, node_id=member(3).node_id)
    bench.maker.ack(late, bench.now)
    bench.maker.ack(replace(late, node_id=member(2).node_id), bench.now)
    assert bench.maker.listeners == (0, 1)
    assert bench.maker.has_acked(member(3))


def test_blank_members_are_no_quorum_of_voters_before() -> None:
    """A member that came back without its state forgot what it promised as a voter; one that only
    restarted did not."""
    first = Office(3)
    plan = first.served()
    for memory, adopted in (("f" * 16, False), (member(2).memory, True)):
        later = Office(1, base=plan, base_active=False, term=2)
        later.members[2] = member(2, boot=1, blank=True, memory=memory)
        later.look(lost={3})
        assert later.voters() == {1, 2, 3}
        later.ack(1, 2)
        assert later.maker.activated is adopted
