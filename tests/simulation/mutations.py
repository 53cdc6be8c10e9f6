"""Defects put into the core on purpose: a simulation that does not find them proves nothing.

Each is one rule left out, by patching the class or function that keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from msgspec.structs import replace

from p2pinfer.core import (
    agreement,
    plan_maker,
    proposal,
    quorum,
    request_entry,
    request_log,
    voters,
)
from p2pinfer.core.commits import Commits
from p2pinfer.core.coverage import Coverage, KvUnit
from p2pinfer.core.durable import Durable
from p2pinfer.core.election import Election
from p2pinfer.core.inputs import Inputs
from p2pinfer.core.replication import Replicas
from p2pinfer.core.step_checks import StepMessage, check_frame
from p2pinfer.core.step_gate import Drop, File, Gap, Hold, StepGate
from p2pinfer.core.token_log import TokenLogs
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.types import Plan
from p2pinfer.wire.messages import Forward, KvDelta, LinkOpen, Slot
from tests.simulation.kv_judge import promoted
from tests.simulation.toy_engine import ToyEngine
from tests.simulation.toy_units import Row

Mutation = Callable[[], AbstractContextManager[None]]


@contextmanager
def _patched(*patches: tuple[Any, str, Any]) -> Iterator[None]:
    """Put something else in the place of attributes, for a while."""
    before = [(owner, name, owner.__dict__[name]) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


# --- the data plane -------------------------------------------------------------------------------


def _as_a_member(gate: StepGate, opening: LinkOpen | None) -> int | None:
    """Which member of the plan in force a link is of."""
    active = gate.active
    if opening is None or active is None:
        return None
    lives = [(member.node_id, member.boot_id) for member in active.plan.members]
    life = (opening.node_id, opening.boot_id)
    return lives.index(life) if life in lives else None


def _fence_unchecked() -> AbstractContextManager[None]:
    """Fence check removed: a frame of a plan that is over is filed with those of this one.

    To leave out the comparison alone shows nothing: numbers begin anew with each fence, so that a
    late frame is taken for a gap, and the cure of a gap is right; and it mostly comes on a link
    that another took the place of. So it is not numbered either, and no link is forgotten.
    """
    arrived, opened = StepGate.arrived, StepGate.opened

    def remembered(gate: StepGate) -> dict[bytes, LinkOpen]:
        routes: dict[bytes, LinkOpen] = gate.__dict__.setdefault("all_routes", {})
        return routes

    def remember(gate: StepGate, route: bytes, message: LinkOpen) -> int | None:
        remembered(gate)[route] = message
        return opened(gate, route, message)

    def lax(gate: StepGate, route: bytes, nbytes: int, message: Any) -> Any:
        active, sender = gate.active, _as_a_member(gate, remembered(gate).get(route))
        if active is None or sender is None or not isinstance(message, StepMessage):
            return arrived(gate, route, nbytes, message)
        if message.fence == active.plan.fence:
            return arrived(gate, route, nbytes, message)
        try:
            check_frame(active, sender, message)
        except RemoteProtocolError as error:
            return Drop(str(error))
        return File(sender)

    return _patched((StepGate, "arrived", lax), (StepGate, "opened", remember))


def _gap_unchecked() -> AbstractContextManager[None]:
    """Gap check removed: a frame that does not follow the one before it is taken all the same."""
    arrived = StepGate.arrived

    def lax(gate: StepGate, route: bytes, nbytes: int, message: Any) -> Any:
        verdict = arrived(gate, route, nbytes, message)
        if not isinstance(verdict, Gap):
            return verdict
        gate._numbers[verdict.sender] = message.link_seq
        return arrived(gate, route, nbytes, message)

    return _patched((StepGate, "arrived", lax))


def _held_unchecked() -> AbstractContextManager[None]:
    """Held frames unchecked: whatever comes while a plan is loaded is kept for it, and filed.

    With the numbers checked once it is in force, they would give a late frame away.
    """
    arrived = StepGate.arrived

    def lax(gate: StepGate, route: bytes, nbytes: int, message: Any) -> Any:
        kept = gate.__dict__.setdefault("kept_unchecked", [])
        if any(message is frame for frame in kept):
            sender = _as_a_member(gate, gate._routes.get(route))
            return Drop("no member") if sender is None else File(sender)
        pending = gate._pending
        if (
            pending is None
            or not isinstance(message, StepMessage)
            or message.fence == pending.plan.fence
        ):
            return arrived(gate, route, nbytes, message)
        kept.append(message)
        gate._held.append((route, message))
        return Hold()

    return _patched((StepGate, "arrived", lax))


def _emitted_before_commit() -> AbstractContextManager[None]:
    """Commit-before-emit removed: a token leaves as soon as it was sent to the others."""
    announced = Commits.announced

    def early(commits: Commits[Any], step: int, news: Iterable[Any]) -> list[Any]:
        told = list(news)
        return [*announced(commits, step, ()), *told]

    return _patched((Commits, "announced", early))


def _owners_not_needed() -> AbstractContextManager[None]:
    """A token counts as committed when a quorum has it, whoever of the owners lacks it."""
    init = Commits.__init__

    def without(commits: Commits[Any], *arguments: Any, **named: Any) -> None:
        init(commits, *arguments, **named)
        commits._owners = frozenset((commits._me,))

    return _patched((Commits, "__init__", without))


def _watermark_off_by_one() -> AbstractContextManager[None]:
    """Watermark off by one: of each log one position more counts as computed than is."""
    covered, least = TokenLogs.covered, Coverage.least

    def more(logs: TokenLogs, plan: Plan) -> Any:
        told = covered(logs, plan)
        return tuple(replace(each, positions=each.positions + 1) for each in told)

    def one_more(coverage: Coverage, request_id: int) -> int:
        return least(coverage, request_id) + 1

    return _patched((TokenLogs, "covered", more), (Coverage, "least", one_more))


def _stale_coverage_trusted() -> AbstractContextManager[None]:
    """Stale coverage trusted: what was computed of units before a plan took them away counts when
    they come back."""

    def hold(coverage: Coverage, computed: Any, fed: Any) -> None:
        coverage.computed, coverage.fed = frozenset(computed), frozenset(fed)

    return _patched((Coverage, "hold", hold))


def _slot_reused() -> AbstractContextManager[None]:
    """Slot reused: KV is found by the place of its log, which another request has later.

    The core names a request by its id alone, so there is nothing in it to leave out.
    """
    rows = ToyEngine._rows

    def placed(engine: ToyEngine, slot: Slot) -> list[Row]:
        place = sorted(engine._logs._logs).index(slot.request_id)
        engine._cache.open(place)
        return [row._replace(request_id=place) for row in rows(engine, slot)]

    return _patched((ToyEngine, "_rows", placed))


def _inputs_beyond_a_hole_counted() -> AbstractContextManager[None]:
    """Inputs count from whichever position on they were written."""

    def finish(inputs: Inputs, request_id: int, _start: int, end: int) -> None:
        of = inputs._positions.setdefault(request_id, {})
        for span in inputs.spans:
            of[span] = max(of.get(span, 0), end)

    return _patched((Inputs, "finish", finish))


# --- replicas -------------------------------------------------------------------------------------


def _delta_beyond_a_gap() -> AbstractContextManager[None]:
    """Delta KV that does not join the watermark is written, and counts."""
    joins = Replicas.joins

    def lax(replicas: Replicas, unit: KvUnit, frame: KvDelta) -> bool:
        end = frame.start + frame.tensor.shape[2]
        known = replicas._logs.digest(frame.request_id, end)
        return joins(replicas, unit, frame) or known == frame.log_digest

    return _patched((Replicas, "joins", lax), (Coverage, "join", _join_anywhere))


def _join_anywhere(
    coverage: Coverage, request_id: int, unit: KvUnit, _start: int, end: int
) -> None:
    of = coverage._positions.setdefault(request_id, {})
    of[unit] = max(of.get(unit, 0), end)


def _delta_digest_unchecked() -> AbstractContextManager[None]:
    """Delta KV is written whatever tokens it was computed for."""
    joins = Replicas.joins

    def lax(replicas: Replicas, unit: KvUnit, frame: KvDelta) -> bool:
        covered = replicas._logs.coverage.of(frame.request_id, unit)
        return joins(replicas, unit, frame) or frame.start <= covered

    return _patched((Replicas, "joins", lax))


def _freed_replica_counted() -> AbstractContextManager[None]:
    """A replica that was freed still counts when the unit is kept again."""
    hold = Coverage.hold

    def lax(coverage: Coverage, computed: Any, fed: Any) -> None:
        freed = coverage.__dict__.setdefault("freed", {})
        for request_id, of in coverage._positions.items():
            for unit in of.keys() & (coverage.fed - computed - fed):
                freed[request_id, unit] = of[unit]
        hold(coverage, computed, fed)
        for request_id, unit in [key for key in freed if key[1] in coverage.fed]:
            if request_id in coverage._positions:
                coverage._positions[request_id][unit] = freed.pop((request_id, unit))

    return _patched((Coverage, "hold", lax))


def _promotion_trusted() -> AbstractContextManager[None]:
    """A standby that is promoted counts as having all, whatever its ACK says of its coverage."""
    collect = proposal.Proposal.collect

    def trusting(self: Any, *arguments: Any) -> Any:
        before = self._before
        known = agreement._covered
        taken = {u.unit for u in promoted(before, self.plan)} if before is not None else set()

        def covered(ack: Any, request_id: int, stage: int, units: set[int], agreed: Any) -> int:
            asked = units - taken
            return known(ack, request_id, stage, asked, agreed) if asked else agreed.length

        with _patched((agreement, "_covered", covered)):
            return collect(self, *arguments)

    return _patched((proposal.Proposal, "collect", trusting))


# --- plans and elections --------------------------------------------------------------------------


def _vote_not_persisted() -> AbstractContextManager[None]:
    """Vote not persisted: it is given without being written down."""

    def vote(durable: Durable, term: int, candidate_id: str, then: Callable[[float], None]) -> None:
        durable.state = replace(durable.state, term=term, voted_for=candidate_id)
        then(0.0)

    return _patched((Durable, "vote", vote))


def _votes_for_all() -> AbstractContextManager[None]:
    """A node votes for everybody who asks in its term."""

    def would(election: Election, term: int, _candidate: str, plan_fence: Any) -> bool:
        state = election._durable.state
        return bool(term >= state.term and plan_fence >= election._durable.fence)

    def vote(durable: Durable, term: int, candidate_id: str, then: Callable[[float], None]) -> None:
        durable._write(replace(durable.state, term=term, voted_for=candidate_id), then)

    return _patched((Election, "_would_vote", would), (Durable, "vote", vote))


def _older_plan_voted_for() -> AbstractContextManager[None]:
    """Older plan voted for: a candidate's plan may be older than the voter's."""

    def would(election: Election, term: int, candidate: str, _plan_fence: Any) -> bool:
        state = election._durable.state
        return term > state.term or (term == state.term and state.voted_for in ("", candidate))

    return _patched((Election, "_would_vote", would))


def _acked_before_persisted() -> AbstractContextManager[None]:
    """A plan is acknowledged before the disk has it."""
    accept = Durable.accept

    def early(durable: Durable, plan: Any, cluster_id: str, then: Callable[[float], None]) -> None:
        accept(durable, plan, cluster_id, lambda _now: None)
        then(0.0)

    return _patched((Durable, "accept", early))


def _half_elects() -> AbstractContextManager[None]:
    """Half of the voters elect a leader."""

    def half(plan: Any, granted: Any, *, active: bool, lost: Any = frozenset()) -> bool:
        return all(
            2 * len(each & granted) >= len(each) for each in quorum.electorate(plan, active=active)
        )

    return _patched((quorum, "elects", half))


def _owner_without_ack() -> AbstractContextManager[None]:
    """Owner without ACK activated: a plan is in force before all its owners have loaded it."""
    return _patched(
        (proposal.Proposal, "enough", _enough_without_owners()),
    )


def _enough_without_owners() -> Any:
    enough = proposal.Proposal.enough

    def lax(self: Any, *arguments: Any, **named: Any) -> bool:
        owners, self.owners = self.owners, ()
        try:
            return bool(enough(self, *arguments, **named))
        finally:
            self.owners = owners

    return lax


def _two_voters_added() -> AbstractContextManager[None]:
    """Two voters added at once: a plan gives all learners a vote."""
    next_voters = voters.next_voters

    def many(base: Any, **named: Any) -> Any:
        new, old = next_voters(base, **named)
        more = {m.node_id for m in named["living"] if m.node_id in named["ready"]}
        return (tuple(sorted({*new, *more})) if named["base_active"] else new), old

    return _patched((plan_maker, "next_voters", many))


def _resume_without_hash() -> AbstractContextManager[None]:
    """Resume without hash: the tokens that a client says it has are not compared with the log.

    (A FORWARD carries the tokens themselves, so there is no need for a hash of them.)
    """

    def same_request(message: Forward, entry: request_entry.Entry) -> str:
        return request_entry.conflict_of(replace(message, received=()), entry)

    return _patched((request_log, "conflict_of", same_request))


MUTATIONS: dict[str, Mutation] = {
    "fence-unchecked": _fence_unchecked,
    "gap-unchecked": _gap_unchecked,
    "held-unchecked": _held_unchecked,
    "emitted-before-commit": _emitted_before_commit,
    "owners-not-needed": _owners_not_needed,
    "watermark-off-by-one": _watermark_off_by_one,
    "stale-coverage-trusted": _stale_coverage_trusted,
    "slot-reused": _slot_reused,
    "inputs-beyond-a-hole": _inputs_beyond_a_hole_counted,
    "delta-beyond-a-gap": _delta_beyond_a_gap,
    "delta-digest-unchecked": _delta_digest_unchecked,
    "freed-replica-counted": _freed_replica_counted,
    "promotion-trusted": _promotion_trusted,
    "vote-not-persisted": _vote_not_persisted,
    "votes-for-all": _votes_for_all,
    "older-plan-voted-for": _older_plan_voted_for,
    "acked-before-persisted": _acked_before_persisted,
    "half-elects": _half_elects,
    "owner-without-ack": _owner_without_ack,
    "two-voters-added": _two_voters_added,
    "resume-without-hash": _resume_without_hash,
}
"""By the name that `--mutation` takes."""


@contextmanager
def mutated(name: str) -> Iterator[None]:
    """The core with that defect; as it is for an empty name."""
    if not name:
        yield
        return
    with MUTATIONS[name]():
        yield
