"""The leader's plans after refusals, failed steps, strays and stragglers."""

from __future__ import annotations

from msgspec.structs import replace

from p2pinfer.core import events as e
from p2pinfer.core.pace import DEAF_S
from p2pinfer.core.timing import LAN
from p2pinfer.types import Fence
from p2pinfer.wire import messages as m
from tests.plan_bench import MODEL, Office, log, member, plan_of, renamed, serving

# --- refusals -------------------------------------------------------------------------------------


def test_a_member_that_refuses_is_left_without_units_for_a_while() -> None:
    """Each time for twice as long, but never for good."""
    bench = serving()
    for times in (1, 2, 4):
        bench.maker.step_failed(bench.plan.fence, "a step failed", now=bench.now)
        bench.look()
        bench.proposed()
        assert bench.nack(2)
        (fact,) = bench.told(e.PlanFailed)
        assert fact.reason == "node2: no memory"
        bench.look()
        assert bench.proposed() == ["node2 to own nothing; node2: no memory"]
        assert bench.owners() == {1, 3}
        bench.adopt(1, 2, 3)
        bench.look(LAN.unable_for * times - 0.1)
        assert bench.proposed() == []
        bench.look(0.2)
        assert bench.proposed() == ["node2 fit again"]
        bench.adopt(1, 2, 3)


def test_a_member_that_cannot_even_listen_is_not_waited_for() -> None:
    """Without units or vote it is not listed until a while has passed."""
    bench = Office(2)
    bench.members[3] = member(3, weight=0.0)
    bench.look()
    bench.nack(3)
    bench.ack(1, 2)
    assert bench.maker.activated
    bench.proposed()
    bench.maker.step_failed(bench.plan.fence, "a step failed", now=bench.now)
    bench.look()
    assert [each.name for each in bench.plan.members] == ["node1", "node2"]
    bench.adopt(1, 2)
    bench.look(LAN.unable_for)
    assert bench.proposed() == ["a step failed", "node3 joined"]


def test_the_leader_itself_may_refuse_units() -> None:
    """Then others hold all of them."""
    bench = Office(2)
    bench.look()
    bench.nack(1)
    bench.look()
    assert bench.owners() == {2}


def test_no_plan_goes_without_its_leader() -> None:
    """A leader that cannot even listen waits, says why, and tries again."""
    bench = Office(2)
    bench.look(draining={1})
    assert bench.owners() == {2}
    bench.nack(1)
    assert bench.maker.target is None
    bench.look(1.0)
    assert bench.maker.waiting == "node1: no memory"
    assert bench.proposed() == ["a new leader"]
    bench.look(LAN.unable_for)
    assert bench.proposed() == ["a new leader"]
    assert bench.plan.fence == Fence(1, 2)


def test_a_member_alone_that_refuses_waits() -> None:
    """With nobody able there is no plan; its reason is told."""
    bench = Office(1, base=plan_of(1), term=2)
    bench.look()
    bench.nack(1)
    bench.look()
    assert bench.maker.waiting == "a node that can hold the model; node1: no memory"


def test_refusals_of_another_fence_mean_nothing() -> None:
    """They are late, and no failed step either."""
    bench = serving()
    stale = m.Nack(fence=Fence(0, 1), node_id=member(2).node_id, code="internal", message="no")
    assert bench.maker.nack(stale, bench.now)
    fresh = replace(stale, fence=bench.plan.fence, node_id=member(9).node_id)
    assert bench.maker.nack(fresh, bench.now)
    bench.look()
    assert bench.proposed() == []


def test_acks_of_another_fence_or_of_strangers_mean_nothing() -> None:
    """Only members of the newest plan can acknowledge it."""
    bench = Office(2)
    bench.maker.ack(m.Ack(fence=Fence(1, 1), node_id=member(2).node_id), bench.now)
    assert not bench.maker.has_acked(member(2))
    bench.look()
    bench.maker.ack(m.Ack(fence=Fence(0, 9), node_id=member(2).node_id), bench.now)
    bench.maker.ack(m.Ack(fence=bench.plan.fence, node_id=member(9).node_id), bench.now)
    assert not bench.maker.has_acked(member(2))
    assert not bench.maker.has_acked(member(9))
    bench.ack(2)
    assert bench.maker.has_acked(member(2))
    assert not bench.maker.has_acked(member(2, boot=1))


# --- failed steps, strays and stragglers ----------------------------------------------------------


def test_a_failed_step_begins_a_new_epoch() -> None:
    """Same owners, next fence; a second report of it is none, and neither is a late one."""
    bench = serving()
    before = bench.plan
    assert bench.maker.in_force(bench.members.values())
    assert bench.maker.step_failed(before.fence, "a frame lacks", now=bench.now)
    assert not bench.maker.in_force(bench.members.values())
    assert not bench.maker.step_failed(before.fence, "another", now=bench.now)
    bench.look()
    assert bench.proposed() == ["a frame lacks"]
    assert bench.plan.stages == before.stages
    assert not bench.maker.step_failed(before.fence, "late", now=bench.now)
    bench.adopt(1, 2, 3)
    assert bench.requests.adopted[-1][1] == ()


def test_a_follower_tells_of_a_failed_step_by_nack() -> None:
    """A NACK with the fence in force is no refusal."""
    bench = serving()
    assert not bench.nack(2, "a frame lacks", about=member(3).node_id)


def test_a_late_refusal_is_no_failed_step() -> None:
    """Who takes no part in the plan in force can only refuse it."""
    bench = Office(2, base=plan_of(2), term=7)
    bench.members[3] = member(3, weight=0.0)
    bench.look()
    bench.ack(1, 2)
    bench.look()
    bench.look(1.0)
    assert bench.maker.activated
    assert bench.nack(3)


def test_a_member_whose_numbers_are_none_rests() -> None:
    """It owns nothing for a while, and its failure is told."""
    bench = serving()
    fence = bench.plan.fence
    for _ in range(2):
        bench.maker.step_failed(
            fence, "not finite", about=member(2).node_id, broken=True, now=bench.now
        )
    bench.look()
    assert bench.owners() == {1, 3}
    bench.adopt(1, 2, 3)
    assert bench.requests.adopted[-1][1] == ("node2",)
    bench.proposed()
    bench.look(LAN.unable_for)
    assert bench.proposed() == ["node2 fit again"]


def test_a_member_that_stopped_obeying_needs_a_new_plan() -> None:
    """It took its leader for lost; nothing else starts it again."""
    bench = serving()
    bench.maker.obeys(member(2).node_id, Fence())
    bench.look()
    assert bench.proposed() == ["node2 obeyed the plan no more"]


def test_a_member_that_never_obeys_is_asked_anew() -> None:
    """It acknowledged, but ACTIVATE finds nothing to activate there."""
    bench = Office(2, base=plan_of(2), term=7)
    bench.look()
    bench.ack(1, 2)
    bench.look(0.5)
    assert len(bench.proposed()) == 1
    bench.look(0.5)
    assert bench.proposed() == ["node2 obeyed the plan no more"]


def test_a_new_epoch_brings_back_whom_no_step_reaches() -> None:
    """Not before it had the time to hear any; if that does not help, less and less often."""
    bench = serving()
    bench.lose(3)
    bench.look()
    bench.adopt(1, 2)
    bench.proposed()
    bench.look(DEAF_S - 0.1, deaf={member(2).node_id})
    assert bench.proposed() == []
    bench.look(0.2)
    assert bench.proposed() == ["node2 obeyed the plan no more"]
    bench.adopt(1, 2)
    bench.look(DEAF_S)
    assert bench.proposed() == ["node2 obeyed the plan no more"]
    bench.adopt(1, 2)
    bench.look(DEAF_S)
    assert bench.proposed() == []
    bench.look(LAN.unable_for)
    assert len(bench.proposed()) == 1


def test_a_straggler_takes_part_from_the_next_plan_on() -> None:
    """Promptly the first time; if it is late again, after a while."""
    bench = Office(2, base=plan_of(2), term=7)
    bench.members[3] = member(3, weight=0.0)
    for wait in (0.0, LAN.unable_for):
        bench.look(wait)
        bench.ack(1, 2)
        bench.look()
        bench.look(LAN.straggle)
        assert bench.maker.activated
        bench.obey(2)
        bench.proposed()
        bench.look(wait / 2)
        assert bench.proposed() == []
        bench.maker.ack(m.Ack(fence=bench.plan.fence, node_id=member(3).node_id), bench.now)
        if wait:
            bench.look(wait / 4)
            assert bench.proposed() == []
        bench.look(wait)
        assert len(bench.proposed()) == 1


def test_tokens_and_their_restart_reach_the_request_log() -> None:
    """The leader's requests go on from the logs agreed on."""
    bench = Office(1)
    bench.look()
    bench.ack(1, logs={1: [log("abc")]})
    whole = log("abc")
    bench.maker.log_entry(
        m.LogEntry(
            fence=bench.plan.fence,
            request_id=1,
            term=whole.term,
            prompt_tokens=1,
            params=whole.params,
            tokens=whole.tokens,
        ),
        member(1).node_id,
        bench.now,
    )
    ((agreed, *_),) = bench.requests.adopted
    assert [(each.request_id, each.restart, each.log.term) for each in agreed] == [(1, 2, 1)]


def test_another_numeric_class_makes_replies_inexact() -> None:
    """Units that move to another kind of machine compute other bits."""
    bench = Office(2)
    bench.members[3] = member(3, numeric_class="o")
    bench.served()
    bench.lose(3)
    bench.look()
    bench.adopt(1, 2)
    assert bench.requests.adopted[-1][1:] == (("node3",), 0.7, False)


def test_what_comes_before_the_first_plan_means_nothing() -> None:
    """Heartbeats, losses, answers and failures find no plan yet."""
    bench = Office(1)
    bench.maker.obeys(member(2).node_id, Fence())
    bench.maker.lost(member(2))
    assert bench.maker.nack(
        m.Nack(fence=Fence(), node_id=member(2).node_id, code="internal", message=""), bench.now
    )
    assert not bench.maker.step_failed(Fence(), "no", now=bench.now)
    assert not bench.maker.in_force(bench.members.values())
    assert bench.maker.listeners == ()
    assert not bench.maker.activated


def test_a_plan_of_another_model_is_no_start() -> None:
    """A cluster that was started again with another model places it anew."""
    base = plan_of(2)
    old = renamed(base, base.fence, model=replace(MODEL, model_id="cd" * 32, num_layers=3))
    bench = Office(2, base=old, term=2)
    bench.look()
    assert bench.plan.model == MODEL
