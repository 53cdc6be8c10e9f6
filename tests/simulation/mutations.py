"""Defects put into the core on purpose: a simulation that does not find them proves nothing.

Each is one rule left out, by patching the class or function that keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from msgspec.structs import replace

from p2pinfer.core import agreement, plan_maker, proposal, quorum, request_entry, voters
from p2pinfer.core.commits import Commits
from p2pinfer.core.durable import Durable
from p2pinfer.core.election import Election
from p2pinfer.core.step_gate import Drop, File, Hold, StepGate
from p2pinfer.core.token_log import TokenLogs

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


def _fence_unchecked() -> AbstractContextManager[None]:
    """Frames of any fence count as those of the plan in force."""
    arrived = StepGate.arrived

    def lax(gate: StepGate, route: bytes, nbytes: int, message: Any) -> Any:
        active = gate.active
        if active is not None and hasattr(message, "fence"):
            message = replace(message, fence=active.plan.fence)
        return arrived(gate, route, nbytes, message)

    return _patched((StepGate, "arrived", lax))


def _gap_unchecked() -> AbstractContextManager[None]:
    """A frame that does not follow the one before it is taken all the same."""
    arrived = StepGate.arrived

    def lax(gate: StepGate, route: bytes, nbytes: int, message: Any) -> Any:
        verdict = arrived(gate, route, nbytes, message)
        sender = getattr(verdict, "sender", None)
        if not isinstance(verdict, File | Hold | Drop) and sender is not None:
            gate._numbers[sender] = message.link_seq
            return arrived(gate, route, nbytes, message)
        return verdict

    return _patched((StepGate, "arrived", lax), (StepGate, "opened", _opened_quietly()))


def _opened_quietly() -> Any:
    opened = StepGate.opened

    def quiet(gate: StepGate, route: bytes, message: Any) -> None:
        opened(gate, route, message)

    return quiet


def _held_unchecked() -> AbstractContextManager[None]:
    """Whatever comes while a plan is loaded is held for it, whatever its fence."""
    arrived = StepGate.arrived

    def lax(gate: StepGate, route: bytes, nbytes: int, message: Any) -> Any:
        pending = gate._pending
        if pending is not None and hasattr(message, "fence"):
            message = replace(message, fence=pending.plan.fence)
        return arrived(gate, route, nbytes, message)

    return _patched((StepGate, "arrived", lax))


def _emitted_before_commit() -> AbstractContextManager[None]:
    """A token leaves as soon as it was sent to the others."""
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
    """Coverage says one position more than was computed."""
    covered = TokenLogs.snapshot

    def more(logs: TokenLogs) -> Any:
        told, coverage = covered(logs)
        return told, tuple(replace(each, positions=each.positions + 1) for each in coverage)

    return _patched((TokenLogs, "snapshot", more))


def _kv_kept_for_other_units() -> AbstractContextManager[None]:
    """Coverage stays as it was when a node gets other units."""
    return _patched((TokenLogs, "lose_kv", lambda _logs: None))


def _coverage_of_any_log() -> AbstractContextManager[None]:
    """KV counts whatever tokens it was written for."""
    return _patched((agreement.Prefixes, "__contains__", lambda _prefixes, _log: True))


def _logs_kept() -> AbstractContextManager[None]:
    """Nothing that ended is forgotten, so that an id that comes again finds what was there."""
    return _patched((TokenLogs, "forget", lambda _logs, _ids: None))


# --- plans and elections --------------------------------------------------------------------------


def _vote_not_persisted() -> AbstractContextManager[None]:
    """A vote is given without being written down."""

    def vote(durable: Durable, term: int, candidate_id: str, then: Callable[[float], None]) -> None:
        durable.state = replace(durable.state, term=term, voted_for=candidate_id)
        then(0.0)

    return _patched((Durable, "vote", vote))


def _votes_for_all() -> AbstractContextManager[None]:
    """A node votes for everybody who asks in its term."""

    def would(election: Election, term: int, _candidate: str, plan_fence: Any) -> bool:
        state = election._durable.state
        return bool(term >= state.term and plan_fence >= election._durable.fence)

    return _patched((Election, "_would_vote", would))


def _older_plan_voted_for() -> AbstractContextManager[None]:
    """A candidate's plan may be older than the voter's."""

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
    """A plan comes into force without the acknowledgement of its owners."""
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
    """A plan adds all learners to its voters at once."""
    next_voters = voters.next_voters

    def many(base: Any, **named: Any) -> Any:
        new, old = next_voters(base, **named)
        more = {m.node_id for m in named["living"] if m.node_id in named["ready"]}
        return (tuple(sorted({*new, *more})) if named["base_active"] else new), old

    owner = plan_maker if "next_voters" in plan_maker.__dict__ else proposal
    return _patched((owner, "next_voters", many))


def _resume_without_check() -> AbstractContextManager[None]:
    """What a client says it has is not compared with the log."""
    return _patched((request_entry, "first_difference", lambda _one, _other: None))


MUTATIONS: dict[str, Mutation] = {
    "fence-unchecked": _fence_unchecked,
    "gap-unchecked": _gap_unchecked,
    "held-unchecked": _held_unchecked,
    "emitted-before-commit": _emitted_before_commit,
    "owners-not-needed": _owners_not_needed,
    "watermark-off-by-one": _watermark_off_by_one,
    "kv-kept-for-other-units": _kv_kept_for_other_units,
    "coverage-of-any-log": _coverage_of_any_log,
    "logs-kept": _logs_kept,
    "vote-not-persisted": _vote_not_persisted,
    "votes-for-all": _votes_for_all,
    "older-plan-voted-for": _older_plan_voted_for,
    "acked-before-persisted": _acked_before_persisted,
    "half-elects": _half_elects,
    "owner-without-ack": _owner_without_ack,
    "two-voters-added": _two_voters_added,
    "resume-without-check": _resume_without_check,
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
