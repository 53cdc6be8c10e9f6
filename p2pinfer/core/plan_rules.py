"""When the leader proposes a plan: small pure rules in order, of which the first that speaks wins.

(The manner is that of exo's planner: an ordered list of conditions over one picture of the state.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from p2pinfer.types import Member, Plan

Boot = tuple[str, str]
"""Node id and boot id: one life of one node."""


def boot(member: Member) -> Boot:
    """Which life of which node a member is."""
    return member.node_id, member.boot_id


def boots(members: Iterable[Member]) -> frozenset[Boot]:
    """The lives of some members."""
    return frozenset(map(boot, members))


@dataclass(frozen=True, slots=True)
class Situation:
    """What the leader sees when it asks itself whether to propose.

    `able` are the living members, itself included, that its messages reach and that have not said
    that they cannot hold their part (those are in `unable`, with what they said). `target` is the
    newest plan, whether in force or being loaded.
    """

    worker_ready: bool
    able: tuple[Member, ...]
    unable: tuple[str, ...]
    suspects: tuple[str, ...]
    target: Plan | None
    broken: frozenset[Boot]
    """Members of the target that were lost since it was proposed, even if they are back."""

    loading: tuple[str, ...]
    settled: bool
    """No member has come or gone for a while."""

    min_nodes: int
    served: bool
    """A plan was in force once: from then on the cluster goes on with whoever remains."""

    step_failed: str
    unplaceable: str
    """Why no plan could be made for these very members, or empty."""

    @property
    def lost(self) -> tuple[str, ...]:
        """Names of members of the target that are gone, or that cannot hold their part."""
        here = boots(self.able) - self.broken
        members = self.target.members if self.target else ()
        return tuple(m.name for m in members if boot(m) not in here)

    @property
    def newcomers(self) -> tuple[str, ...]:
        """Names of members that the target does not know."""
        there = boots(self.target.members if self.target else ())
        return tuple(m.name for m in self.able if boot(m) not in there)


@dataclass(frozen=True, slots=True)
class Decision:
    """Propose, or wait; and why. `why` empty: there is nothing to wait for."""

    propose: bool
    why: str = ""


def decide(situation: Situation) -> Decision:
    """What the first rule says that has something to say."""
    for rule in _RULES:
        if decision := rule(situation):
            return decision
    return Decision(propose=False)


def _worker(s: Situation) -> Decision | None:
    return None if s.worker_ready else Decision(propose=False, why="this node's worker to start")


def _suspects(s: Situation) -> Decision | None:
    """A plan with a suspect is a gamble, and the doubt is short: at most `dead_after`."""
    return Decision(propose=False, why=f"a word from {_names(s.suspects)}") if s.suspects else None


def _unplaceable(s: Situation) -> Decision | None:
    return Decision(propose=False, why=s.unplaceable) if s.unplaceable else None


def _too_few(s: Situation) -> Decision | None:
    """Enough nodes are asked for only until there was a first plan."""
    count = sum(not member.witness for member in s.able)
    if s.served or count >= s.min_nodes:
        return None
    why = "; ".join((f"{count} of {s.min_nodes} nodes", *s.unable))
    return Decision(propose=False, why=why)


def _lost(s: Situation) -> Decision | None:
    why = "; ".join((f"{_names(s.lost)} gone", *s.unable))
    return Decision(propose=True, why=why) if s.lost else None


def _step_failed(s: Situation) -> Decision | None:
    return Decision(propose=True, why=s.step_failed) if s.step_failed else None


def _newcomers(s: Situation) -> Decision | None:
    if not s.newcomers:
        return None
    if not s.settled:
        return Decision(propose=False, why="the members to settle")
    return Decision(propose=True, why=f"{_names(s.newcomers)} joined")


def _loading(s: Situation) -> Decision | None:
    if not s.loading:
        return None
    return Decision(propose=False, why=f"{_names(s.loading)} to load the weights")


_RULES: tuple[Callable[[Situation], Decision | None], ...] = (
    _worker,
    _suspects,
    _unplaceable,
    _too_few,
    _lost,
    _step_failed,
    _newcomers,
    _loading,
)


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names)
