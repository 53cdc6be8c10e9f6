"""How a node obeys plans: loading, acknowledging, refusing, and the logs it begins with."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from p2pinfer.core import events as e
from p2pinfer.core.agreement import digest, summary
from p2pinfer.core.planner import make_plan
from p2pinfer.types import Fence, Plan
from p2pinfer.wire import messages as m
from tests.plan_bench import CLUSTER, MODEL, Holding, log, member, renamed

OTHER_CLUSTER = "d" * 16


def plan_of(*numbers: int, epoch: int = 1, leader: int = 1, term: int = 3) -> Plan:
    """A plan of those nodes."""
    return make_plan(
        members=[member(n) for n in numbers],
        model=MODEL,
        layout="heads",
        fence=Fence(term, epoch),
        cluster_id=CLUSTER,
        leader_id=member(leader).node_id,
    )


PLAN = plan_of(1, 2)
NEXT = plan_of(1, 2, epoch=2)


def agreed(text: str, restart: int = 0, request_id: int = 1) -> m.AgreedLog:
    """What ACTIVATE says of a log whose tokens are letters."""
    tokens = log(text).tokens
    return m.AgreedLog(
        request_id=request_id, length=len(tokens), digest=digest(tokens), restart=restart
    )


def entry(text: str, start: int = 0, plan: Plan = PLAN) -> m.LogEntry:
    """The leader's tail of a log, from `start` on."""
    whole = log(text)
    return m.LogEntry(
        fence=plan.fence,
        request_id=1,
        term=whole.term,
        prompt_tokens=2,
        params=whole.params,
        start=start,
        tokens=whole.tokens[start:],
    )


@pytest.fixture
def node() -> Holding:
    """Node 2, whose worker is ready."""
    bench = Holding(2)
    bench.holder.worker_started()
    return bench


def test_a_plan_is_loaded_and_written_at_once(node: Holding) -> None:
    """PROPOSE stops the worker and goes to the disk; no ACK is sent before both are done."""
    node.propose(PLAN)
    assert node.ordered(e.LoadPlan) == [e.LoadPlan(plan=PLAN, me=1)]
    assert node.durable.plan == PLAN
    assert node.holder.pending == PLAN
    assert not node.sent(m.Ack)


@pytest.mark.parametrize("disk_first", [True, False])
def test_an_ack_waits_for_disk_and_worker(node: Holding, disk_first: bool) -> None:
    """The ACK is sent when the plan is loaded and persisted, whichever comes last."""
    node.propose(PLAN)
    for disk in (disk_first, not disk_first):
        assert not node.sent(m.Ack)
        if disk:
            node.persist()
        else:
            node.load(PLAN)
    assert node.sent(m.Ack) == [(1, m.Ack(fence=PLAN.fence, node_id=node.me.node_id))]


def test_an_ack_tells_logs_and_the_coverage_of_own_head_units(node: Holding) -> None:
    """Length, term and digest of each log, and the KV of the units owned by the new plan."""
    node.ready(PLAN, log("abc"), covered=2)
    ((_, ack),) = node.sent(m.Ack)
    assert ack.logs == (summary(log("abc")),)
    assert ack.coverage == (m.CoverageRun(request_id=1, stage=0, units=(2, 3), positions=2),)


def test_a_witness_covers_nothing_but_has_the_logs() -> None:
    """A witness writes logs and owns no units."""
    witness = Holding(2, witness=True, numeric_class="")
    plan = make_plan(
        members=[member(1), witness.me],
        model=MODEL,
        layout="heads",
        fence=Fence(3, 1),
        cluster_id=CLUSTER,
        leader_id=member(1).node_id,
    )
    witness.ready(plan, log("abc"), covered=2)
    ((_, ack),) = witness.sent(m.Ack)
    assert (len(ack.logs), ack.coverage) == (1, ())


def test_a_plan_waits_for_the_worker_to_start() -> None:
    """What is proposed before the worker runs is loaded when it does."""
    node = Holding(2)
    node.propose(PLAN)
    assert not node.ordered(e.LoadPlan)
    node.holder.worker_started()
    assert node.ordered(e.LoadPlan) == [e.LoadPlan(plan=PLAN, me=1)]


def test_a_proposal_sent_again_is_answered_again(node: Holding) -> None:
    """A lost ACK is repeated, and the plan is neither loaded nor written twice."""
    node.ready(PLAN)
    node.sent(m.Ack)
    node.ordered(e.LoadPlan)
    node.propose(PLAN)
    assert len(node.sent(m.Ack)) == 1
    assert not node.ordered(e.LoadPlan)
    assert not node.told(e.Persist)


def test_a_proposal_in_force_is_not_answered(node: Holding) -> None:
    """A repetition that crossed our ACK changes nothing."""
    node.ready(PLAN)
    node.activate(PLAN)
    node.sent(m.Ack)
    node.propose(PLAN)
    assert (node.sent(m.Ack), node.dropped(), node.holder.obeyed) == ([], [], PLAN.fence)


def test_a_proposal_overtakes_the_one_being_loaded(node: Holding) -> None:
    """The newer plan counts; what is said of the older one comes too late."""
    node.propose(PLAN)
    node.propose(NEXT)
    node.load(PLAN)
    node.persist()
    assert not node.sent(m.Ack)
    node.load(NEXT)
    assert [ack.fence for _, ack in node.sent(m.Ack)] == [NEXT.fence]


def test_only_a_newer_plan_of_the_leader_is_taken(node: Holding) -> None:
    """Sender, cluster, term, fence and this node's place are checked."""
    node.ready(NEXT)
    node.durable.enter_term(4)
    later = renamed(PLAN, Fence(4, 3))
    absent = replace(later, members=(later.members[0], member(2, boot=1)))
    node.propose(later, sender=3)
    node.propose(replace(later, leader=9))
    node.propose(later, cluster=OTHER_CLUSTER)
    node.propose(renamed(PLAN, Fence(3, 9)))
    node.propose(absent)
    assert node.dropped() == [
        "PROPOSE: it names a leader that its sender is not",
        "PROPOSE: it names a leader that its sender is not",
        f"PROPOSE: it is of cluster {CLUSTER}",
        "PROPOSE: its term 3 is over, the term is 4",
        "PROPOSE: this life of the node has no place in it",
    ]
    assert node.holder.pending == NEXT


def test_an_older_plan_is_not_taken(node: Holding) -> None:
    """Fences only grow, whatever comes late."""
    node.ready(NEXT)
    node.propose(PLAN)
    assert node.dropped() == ["PROPOSE: its fence (3, 1) is not above (3, 2)"]


def test_an_invalid_plan_is_refused_and_not_written(node: Holding) -> None:
    """A plan that breaks an invariant is answered by NACK, each time it comes."""
    node.ready(PLAN)
    node.activate(PLAN)
    node.told(e.Persist)
    broken = replace(NEXT, stages=(replace(NEXT.stages[0], end=1),))
    for _ in range(2):
        node.propose(broken)
        ((_, nack),) = node.sent(m.Nack)
        assert (nack.fence, nack.code) == (NEXT.fence, "internal")
    assert node.ordered(e.Halt) == [e.Halt()]
    assert len(node.told(e.PlanFailed)) == 1
    assert not node.told(e.Persist)
    assert node.holder.obeyed == Fence()


def test_a_plan_of_another_model_is_refused(node: Holding) -> None:
    """The message names both models."""
    node.propose(replace(PLAN, model=replace(MODEL, model_id="cd" * 32)))
    ((_, nack),) = node.sent(m.Nack)
    assert "cdcdcdcdcdcd" in nack.message
    assert "abababababab" in nack.message


def test_a_plan_of_another_number_format_is_refused(node: Holding) -> None:
    """Of weights or of sums."""
    node.propose(replace(PLAN, model=replace(MODEL, wire_dtype="bfloat16")))
    ((_, nack),) = node.sent(m.Nack)
    assert "sums in bfloat16" in nack.message
    assert "sums in float32" in nack.message


def test_a_plan_that_cannot_be_loaded_is_refused(node: Holding) -> None:
    """The worker's error is the reason; the next proposal is taken as ever."""
    node.propose(PLAN)
    node.load(PLAN, error="no memory")
    ((receiver, nack),) = node.sent(m.Nack)
    assert (receiver, nack.message) == (1, "no memory")
    assert node.told(e.PlanFailed) == [e.PlanFailed(fence=PLAN.fence, reason="no memory")]
    node.persist()
    assert not node.sent(m.Ack)
    node.ready(NEXT)
    assert len(node.sent(m.Ack)) == 1


def test_log_entries_answer_what_the_leader_asks_for(node: Holding) -> None:
    """Whole logs as they stood when the worker stopped; unknown requests are passed over."""
    node.ready(PLAN, log("abc"))
    asked = m.LogRequest(fence=PLAN.fence, request_ids=(1, 2))
    node.holder.log_request(asked, member(1).node_id)
    ((receiver, answer),) = node.sent(m.LogEntry)
    assert receiver == 1
    assert (answer.start, answer.tokens, answer.prompt_tokens) == (0, log("abc").tokens, 1)


def test_logs_are_told_of_the_pending_plan_only(node: Holding) -> None:
    """A request of another fence, or before the plan is loaded, is dropped."""
    asked = m.LogRequest(fence=PLAN.fence, request_ids=(1,))
    node.holder.log_request(asked, member(1).node_id)
    node.propose(PLAN)
    node.holder.log_request(asked, member(1).node_id)
    node.load(PLAN, log("abc"))
    node.holder.log_request(replace(asked, fence=NEXT.fence), member(1).node_id)
    assert not node.sent(m.LogEntry)
    assert len(node.dropped()) == 3


def test_activate_puts_the_plan_in_force_with_its_logs(node: Holding) -> None:
    """The worker gets the whole logs, under the new term, and others are forgotten."""
    node.ready(PLAN, log("abc"), log("x", request_id=2))
    node.now += 0.5
    node.activate(PLAN, agreed("abc", restart=2))
    (order,) = node.ordered(e.ActivatePlan)
    assert order == e.ActivatePlan(fence=PLAN.fence, logs=(log("abc", term=3),), computed={1: 2})
    (fact,) = node.told(e.PlanAdopted)
    assert (fact.members, fact.leader, fact.voters) == (("node1", "node2"), "node1", fact.members)
    assert fact.agree_s == 0.5
    assert node.durable.state.active
    assert node.holder.active == PLAN
    assert node.holder.pending is None
    assert node.holder.obeyed == PLAN.fence


def test_the_worker_learns_what_is_made_of_inputs(node: Holding) -> None:
    """The ACK tells what is kept, ACTIVATE which positions it is for, whoever makes them."""
    node.ready(PLAN, log("abc"), log("xy", request_id=2), inputs=2)
    ((_, ack),) = node.sent(m.Ack)
    assert ack.inputs == tuple(
        m.InputsRun(request_id=number, stage=0, positions=2) for number in (1, 2)
    )
    made = replace(agreed("abc", restart=2), recompute=1)
    node.activate(PLAN, made, agreed("xy", restart=1, request_id=2))
    (order,) = node.ordered(e.ActivatePlan)
    assert order.recomputes == (e.Recompute(request_id=1, position=2, rows=1),)


def test_the_leaders_own_worker_learns_who_listens(node: Holding) -> None:
    """Only the leader knows which members take part in steps."""
    node.ready(PLAN)
    node.activate(PLAN, listeners=(0, 1))
    (order,) = node.ordered(e.ActivatePlan)
    assert order.listeners == (0, 1)


@pytest.mark.parametrize(
    ("own", "text", "start"), [("ab", "abcd", 2), ("", "abcd", 0), ("axyz", "abcd", 0)]
)
def test_a_tail_from_the_leader_completes_a_log(
    node: Holding, own: str, text: str, start: int
) -> None:
    """What a node lacks, or has otherwise, comes before ACTIVATE, with the request's settings."""
    node.ready(PLAN, *([log(own)] if own else []))
    node.holder.log_entry(entry(text, start))
    node.activate(PLAN, agreed(text))
    (order,) = node.ordered(e.ActivatePlan)
    assert order.logs == (replace(log(text, term=3), prompt_tokens=2),)


def test_a_longer_log_is_cut(node: Holding) -> None:
    """Tokens beyond the agreed ones were not committed."""
    node.ready(PLAN, log("abcd"))
    node.activate(PLAN, agreed("ab"))
    (order,) = node.ordered(e.ActivatePlan)
    assert order.logs == (log("ab", term=3),)


def test_activate_is_dropped_until_the_logs_match(node: Holding) -> None:
    """Length and digest are compared; a node without the right log obeys nothing."""
    node.ready(PLAN, log("ab"))
    for wrong in (None, entry("abcd", 3), entry("abxx", 2), entry("abc", 2)):
        if wrong:
            node.holder.log_entry(wrong)
        node.activate(PLAN, agreed("abcd"))
        assert node.dropped() == ["ACTIVATE of (3, 1): the log of request 1 lacks"]
    node.holder.log_entry(entry("abcd", 2))
    node.activate(PLAN, agreed("abcd"))
    assert node.holder.obeyed == PLAN.fence


def test_log_entries_of_another_fence_or_too_early_are_ignored(node: Holding) -> None:
    """A tail counts only for the plan that is loaded and pending."""
    node.holder.log_entry(entry("ab"))
    node.propose(PLAN)
    node.holder.log_entry(entry("ab"))
    node.load(PLAN)
    node.persist()
    node.holder.log_entry(entry("ab", plan=NEXT))
    node.activate(PLAN, agreed("ab"))
    assert len(node.dropped()) == 1


def test_activate_of_a_plan_that_is_not_ready_is_dropped(node: Holding) -> None:
    """Neither an unknown plan, nor one that is not loaded or not on the disk, comes into force."""
    node.activate(PLAN)
    node.propose(PLAN)
    node.activate(PLAN)
    node.load(PLAN)
    node.activate(PLAN)
    node.persist()
    node.activate(NEXT)
    assert node.dropped() == [
        "ACTIVATE of (3, 1): it is not loaded here",
        "ACTIVATE of (3, 1): it is not loaded here",
        "ACTIVATE of (3, 1): it is not loaded here",
        "ACTIVATE of (3, 2): it is not loaded here",
    ]
    node.activate(PLAN)
    assert node.holder.obeyed == PLAN.fence


def test_activate_again_changes_nothing(node: Holding) -> None:
    """A repetition is no second activation."""
    node.ready(PLAN)
    node.activate(PLAN)
    node.activate(PLAN)
    assert len(node.ordered(e.ActivatePlan)) == 1
    assert not node.dropped()


def test_nothing_is_obeyed_while_the_next_plan_loads(node: Holding) -> None:
    """The old plan ends with the proposal of the new one."""
    node.ready(PLAN)
    node.activate(PLAN)
    node.propose(NEXT)
    assert node.holder.obeyed == Fence()
    assert node.holder.active == PLAN


def test_a_step_that_failed_here_ends_obedience(node: Holding) -> None:
    """Until the next plan is in force heartbeats say so; a failure of another plan is no news."""
    assert not node.holder.broke_off(Fence())
    node.ready(PLAN)
    assert not node.holder.broke_off(PLAN.fence)
    node.activate(PLAN)
    assert not node.holder.broke_off(NEXT.fence)
    assert node.holder.obeyed == PLAN.fence
    assert node.holder.broke_off(PLAN.fence)
    assert not node.holder.broke_off(PLAN.fence)
    assert (node.holder.obeyed, node.holder.active) == (Fence(), PLAN)
    node.activate(PLAN)
    assert node.dropped() == ["ACTIVATE of (3, 1): it is not loaded here"]
    node.ready(NEXT)
    node.activate(NEXT)
    assert node.holder.obeyed == NEXT.fence


def test_without_a_leader_the_worker_halts(node: Holding) -> None:
    """The plan in force ends with its leader's office; logs and KV stay."""
    node.holder.halt()
    assert not node.ordered(e.Halt)
    node.ready(PLAN)
    node.activate(PLAN)
    node.holder.halt()
    assert node.ordered(e.Halt) == [e.Halt()]
    assert node.holder.active is None
    node.activate(PLAN)
    assert node.dropped() == ["ACTIVATE of (3, 1): it is not loaded here"]


def test_a_plan_that_is_ready_outlives_a_false_alarm(node: Holding) -> None:
    """If the leader was there all along, what was acknowledged may still be activated."""
    node.ready(PLAN)
    node.activate(PLAN)
    node.ready(NEXT)
    node.holder.halt()
    assert not node.ordered(e.Halt)
    node.activate(NEXT)
    assert node.holder.obeyed == NEXT.fence


def test_after_a_restart_nothing_is_in_force() -> None:
    """The accepted plan is known, not loaded; only a newer one is taken."""
    state = e.StoredState(cluster_id=CLUSTER, term=3, plan=PLAN, active=True)
    node = Holding(2, stored=state, boot=1)
    node.holder.worker_started()
    assert node.holder.obeyed == Fence()
    node.propose(PLAN)
    assert len(node.dropped()) == 1
    mine = replace(NEXT, members=(NEXT.members[0], node.me))
    node.ready(mine)
    assert len(node.sent(m.Ack)) == 1
